"""``adarankgrad sparsify``: what is left of a trained model at every density."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from adarankgrad.reparam import DENSITIES, sparsify
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


@dataclass(frozen=True)
class Subject:
    """What is pruned, and how it is judged.

    Attributes:
        model: On its device, in evaluation mode, float32.
        evaluate: Returns metrics of a model, ``loss`` among them.
        metric: The one to draw beside the loss, which it may be itself.
        loss_label: What the loss is.
    """

    model: nn.Module
    evaluate: Callable[[nn.Module], dict[str, float]]
    metric: str
    loss_label: str


def measure_sparsity(
    request: SparsityRequest, open_run: Callable[[RunRecord, torch.device], Subject] | None = None
) -> dict[str, Any]:
    """Evaluate a run's model at every density and leave ``sparsity.json`` and a plot in the run.

    The weights that are largest in magnitude are kept; embeddings, norms, biases, and an output
    layer that is tied to the embeddings stay whole. Evaluates in float32 on all of the run's
    validation data.

    Args:
        request: Which run, and how to prune.
        open_run: From a run and a device to what is pruned; None: `open_trained`.

    Returns:
        The content of sparsity.json, densities falling.

    Raises:
        UserError: The request cannot be met; nothing was written.
    """
    from adarankgrad.train.density_figure import write_density_figure

    request.check()
    quiet_transformers()
    run = load_run(request.run_dir)
    subject = (open_run or open_trained)(run, resolve_device(request.device))
    options = _options(run, subject.model, request)
    result = {
        "run": str(run.path),
        "powerprop": run.config.get("powerprop"),
        "scope": request.scope,
        "double_output": request.doubles_output,
        "metric": subject.metric,
        "points": [
            _at_density(subject, density, options)
            # Falling, so that each only takes more away from the one before.
            for density in sorted(set(request.densities), reverse=True)
        ],
    }
    write_atomic(run.path / SPARSITY_NAME, json.dumps(result, indent=1))
    write_density_figure(run, result, subject.loss_label)
    return result


def open_trained(run: RunRecord, device: torch.device) -> Subject:
    """Load what ``adarankgrad train`` left: its model, judged on its validation tokens.

    Raises:
        UserError: The model or the tokens are missing or damaged.
    """
    blocks = Blocks(load_tokens(run.path / TOKENS_FOLDER).validation, int(run.config["seq_len"]))
    folder = model_folder(run)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model: nn.Module = build_model(ModelPlan(config, folder), seed=0)
    batch_size = int(run.config["batch_size"])

    return Subject(
        model.to(device).eval(),
        lambda model: _language_metrics(model, blocks, batch_size),
        "accuracy",
        "validation loss\n(nats per token)",
    )


def model_folder(run: RunRecord) -> Path:
    """Return where a run left its whole model.

    Raises:
        UserError: There is none.
    """
    folder = run.path / MODEL_FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: train again, or name another run.")
    return folder


def _options(run: RunRecord, model: nn.Module, request: SparsityRequest) -> dict[str, Any]:
    """Return the arguments of `sparsify` beside the density."""
    head = _output_layer(model)
    is_tied = head is not None and _is_tied(model, head)
    if request.doubles_output and (head is None or is_tied):
        raise UserError(
            f"{run.path}: the output layer is {'tied' if is_tied else 'unknown'}, so it cannot "
            "keep twice the share: leave --double-output out."
        )
    return {
        "scope": request.scope,
        "output_layer": head if request.doubles_output else None,
        "exclude": f"^{head}\\." if is_tied else (),
    }


def _at_density(subject: Subject, density: float, options: dict[str, Any]) -> dict[str, float]:
    masks = sparsify(subject.model, density, **options)
    metrics = subject.evaluate(subject.model)
    return {
        "density": density,
        "num_kept": sum(int(mask.sum()) for mask in masks.values()),
        "num_weights": sum(mask.numel() for mask in masks.values()),
        "val_loss": metrics.pop("loss"),
        **metrics,
    }


def _language_metrics(model: Any, blocks: Blocks, batch_size: int) -> dict[str, float]:
    """Return loss in nats a token, perplexity, and the share of tokens that are the likeliest."""
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
    return {"loss": loss, "perplexity": perplexity(loss), "accuracy": hits / num_targets}


def _batches(blocks: Blocks, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(blocks), batch_size):
        rows = range(start, min(start + batch_size, len(blocks)))
        yield torch.stack([blocks[row]["input_ids"] for row in rows])


def _output_layer(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _is_tied(model: nn.Module, head: str) -> bool:
    name = f"{head}.weight"
    return name not in dict(model.named_parameters())
