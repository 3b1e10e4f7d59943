"""``adarankgrad train``: flags and TOML to a `TrainConfig`, then training."""

from __future__ import annotations

import inspect
from typing import Any

from adarankgrad.cli.options import option_for
from adarankgrad.cli.runs import RUN_PARAMETERS, read_request
from adarankgrad.train.config import FIELDS, TrainConfig

_PARAMETERS = [*(option_for(spec) for spec in FIELDS.values()), *RUN_PARAMETERS]


def train(**options: Any) -> None:
    """Train a causal language model and report what its optimizer did.

    Example: adarankgrad train --data corpus/ --output runs/first --steps 500
    """
    request = read_request(options, TrainConfig)

    from adarankgrad.train.run import train as run_training

    request.run(run_training)


train.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
train.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}
