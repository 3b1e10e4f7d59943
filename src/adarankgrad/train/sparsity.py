"""``adarankgrad sparsify``: what is left of a trained model at every density."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adarankgrad.reparam import sparsify
from adarankgrad.train.errors import UserError
from adarankgrad.train.files import write_atomic
from adarankgrad.train.folder import MODEL_FOLDER, SPARSITY_NAME, TOKENS_FOLDER
from adarankgrad.train.presets import ModelPlan, build_model
from adarankgrad.train.quiet import quiet_transformers
from adarankgrad.train.record import RunRecord, load_run
from adarankgrad.train.recorder import perplexity
from adarankgrad.train.settings import resolve_device
from adarankgrad.train.tokens import Blocks, load_tokens

SCOPES = ("layer", "global")
DENSITIES = tuple(float(f"{0.01 ** (step / 19):.4g}") for step in range(20))
"""20 densities from 1 to 0.01, geometrically, as in the authors' notebook."""


@dataclass(frozen=True)
class SparsityRequest:
    """Which trained model to prune, and how.

    Attributes:
        run_dir: A finished run.
        densities: Shares of the weights of linear layers to keep, each in (0, 1].
        scope: ``"layer"`` or ``"global"``.
        doubles_output: Whether the output layer keeps twice the share.
        device: Where to evaluate.
    """

    run_dir: Path
    densities: Sequence[float] = DENSITIES
    scope: str = "layer"
    doubles_output: bool = False
    device: str = "auto"

    def check(self) -> None:
        """Check what can be checked without loading the model.

        Raises:
            UserError: A density or the scope is not allowed.
        """
        if not self.densities:
            raise UserError("--densities is empty: give shares such as 1,0.5,0.1.")
        for density in self.densities:
            if not 0 < density <= 1:
                raise UserError(
                    f"densities: {density:g} is outside (0, 1]: give shares of the weights to "
                    "keep, such as 1,0.5,0.1."
                )
        if self.scope not in SCOPES:
            raise UserError(f"scope {self.scope!r} is unknown: use {' or '.join(SCOPES)}.")


def measure_sparsity(request: SparsityRequest) -> dict[str, Any]:
    """Evaluate a run's model at every density and leave ``sparsity.json`` and a plot in the run.

    The weights that are largest in magnitude are kept; embeddings, norms, biases, and an output
    layer that is tied to the embeddings stay whole. Evaluates in float32 on all of the run's
    validation tokens.

    Returns:
        The content of sparsity.json, densities falling.

    Raises:
        UserError: The request cannot be met; nothing was written.
    """
    from adarankgrad.train.density_figure import write_density_figure

    request.check()
    quiet_transformers()
    run = load_run(request.run_dir)
    device = resolve_device(request.device)
    model = _load_model(run).to(device).eval()
    head = _output_layer(model)
    is_tied = head is not None and _is_tied(model, head)
    if request.doubles_output and (head is None or is_tied):
        raise UserError(
            f"{run.path}: the output layer is {'tied' if is_tied else 'unknown'}, so it cannot "
            "keep twice the share: leave --double-output out."
        )
    blocks = Blocks(load_tokens(run.path / TOKENS_FOLDER).validation, int(run.config["seq_len"]))
    options: dict[str, Any] = {
        "scope": request.scope,
        "output_layer": head if request.doubles_output else None,
        "exclude": f"^{head}\\." if is_tied else (),
    }
    result = {
        "run": str(run.path),
        "powerprop": run.config.get("powerprop"),
        "scope": request.scope,
        "double_output": request.doubles_output,
        "points": [
            asdict(_at_density(model, density, options, blocks, int(run.config["batch_size"])))
            # Falling, so that each only takes more away from the one before.
            for density in sorted(set(request.densities), reverse=True)
        ],
    }
    write_atomic(run.path / SPARSITY_NAME, json.dumps(result, indent=1))
    write_density_figure(run, result)
    return result


@dataclass(frozen=True)
class _Point:
    """The quality at one density: kept weights, loss in nats a token, share of tokens hit."""

    density: float
    num_kept: int
    num_weights: int
    val_loss: float
    perplexity: float
    accuracy: float


def _at_density(
    model: nn.Module, density: float, options: dict[str, Any], blocks: Blocks, batch_size: int
) -> _Point:
    masks = sparsify(model, density, **options)
    loss_sum = hits = num_rows = num_targets = 0.0
    for batch in _batches(blocks, batch_size):
        ids = batch.to(next(model.parameters()).device)
        with torch.no_grad():
            output: Any = model(input_ids=ids, labels=ids)
        loss_sum += float(output.loss) * len(ids)
        hits += float((output.logits[:, :-1].argmax(-1) == ids[:, 1:]).sum())
        num_rows += len(ids)
        num_targets += ids[:, 1:].numel()
    loss = loss_sum / num_rows
    return _Point(
        density,
        sum(int(mask.sum()) for mask in masks.values()),
        sum(mask.numel() for mask in masks.values()),
        loss,
        perplexity(loss),
        hits / num_targets,
    )


def _batches(blocks: Blocks, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(blocks), batch_size):
        rows = range(start, min(start + batch_size, len(blocks)))
        yield torch.stack([blocks[row]["input_ids"] for row in rows])


def _load_model(run: RunRecord) -> nn.Module:
    folder = run.path / MODEL_FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: train again, or name another run.")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return build_model(ModelPlan(config, folder), seed=0)


def _output_layer(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _is_tied(model: nn.Module, head: str) -> bool:
    name = f"{head}.weight"
    return name not in dict(model.named_parameters())
