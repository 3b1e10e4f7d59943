"""``adarankgrad finetune``: flags and TOML to a `FinetuneConfig`, then fine-tuning."""

from __future__ import annotations

import inspect
from typing import Any

from adarankgrad.cli.options import option_for
from adarankgrad.cli.runs import RUN_PARAMETERS, read_request
from adarankgrad.finetune.config import FinetuneConfig
from adarankgrad.finetune.inputs import check_inputs

_PARAMETERS = [
    *(option_for(spec) for spec in FinetuneConfig.settings().values()),
    *RUN_PARAMETERS,
]


def finetune(**options: Any) -> None:
    """Fine-tune a pretrained model and report how well it does.

    Example: adarankgrad finetune --task classification --model models/minilm --data train.tsv
    --validation dev.tsv --epochs 1 --output runs/sst2
    """
    request = read_request(options, FinetuneConfig)
    check_inputs(request.config, resume=request.resume)

    from adarankgrad.finetune.run import finetune as run_finetuning

    request.run(run_finetuning)


finetune.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
finetune.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}
