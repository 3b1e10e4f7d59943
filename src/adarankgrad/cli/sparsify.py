"""``adarankgrad sparsify``: loss and metrics of a trained model over the share of weights kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adarankgrad.train.errors import UserError

if TYPE_CHECKING:
    import torch

    from adarankgrad.train.record import RunRecord
    from adarankgrad.train.sparsity import Subject


def sparsify(
    run: Annotated[
        Path, typer.Option(help="A finished run of train, or of finetune with a whole model.")
    ],
    densities: Annotated[
        str | None,
        typer.Option(
            help="Shares of weights to keep. Default: 20 from 1 to 0.01, geometrically.",
            metavar="A,B,...",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[str, typer.Option(help="Keep the largest of each layer, or global.")] = (
        "layer"
    ),
    double_output: Annotated[
        bool, typer.Option("--double-output", help="The output layer keeps twice the share.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the curve as one JSON object, the last line."),
    ] = False,
) -> None:
    """Prune a trained model by magnitude, without retraining, and draw what each density costs.

    A run of finetune is judged by its own task, on its own validation examples.

    Example: adarankgrad sparsify --run runs/first --densities 1,0.3,0.1
    """
    given = None if densities is None else _parse(densities)

    from rich.console import Console

    from adarankgrad.train.sparsity import SparsityRequest, measure_sparsity

    request = SparsityRequest(
        run.expanduser(), scope=scope, doubles_output=double_output, device=device
    )
    if given is not None:
        request = replace(request, densities=given)
    result = measure_sparsity(request, _open_run)
    console = Console(stderr=as_json)
    console.print(_table(result))
    plot = run.expanduser() / "plots" / "sparsity.png"
    console.print(f"Plot: {plot}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(result))


def _parse(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--densities {text!r} is not a list of shares such as 1,0.1.") from error


def _open_run(run: RunRecord, device: torch.device) -> Subject:
    from adarankgrad.finetune.sparsity import is_finetuned, open_finetuned
    from adarankgrad.train.sparsity import open_trained

    return (open_finetuned if is_finetuned(run) else open_trained)(run, device)


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    first, *_ = points = result["points"]
    metrics = list(first)[list(first).index("val_loss") + 1 :]
    table = Table()
    for header in ("density", "weights kept", "validation loss", *metrics):
        table.add_column(header, justify="right")
    for point in points:
        table.add_row(
            f"{100 * point['density']:.4g} %",
            f"{point['num_kept']:,} of {point['num_weights']:,}",
            f"{point['val_loss']:.4f}",
            *(f"{point[name]:.4g}" for name in metrics),
        )
    return table
