"""``adarankgrad sparsify``: loss and accuracy of a trained model over the share of weights kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from adarankgrad.train.errors import UserError


def sparsify(
    run: Annotated[Path, typer.Option(help="A finished run folder.")],
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

    Example: adarankgrad sparsify --run runs/first --densities 1,0.3,0.1
    """
    given = None if densities is None else _parse(densities)

    from rich.console import Console

    from adarankgrad.train.sparsity import DENSITIES, SparsityRequest, measure_sparsity

    request = SparsityRequest(
        run.expanduser(), DENSITIES if given is None else given, scope, double_output, device
    )
    result = measure_sparsity(request)
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


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table()
    for header in ("density", "weights kept", "validation loss", "perplexity", "accuracy"):
        table.add_column(header, justify="right")
    for point in result["points"]:
        table.add_row(
            f"{100 * point['density']:.4g} %",
            f"{point['num_kept']:,} of {point['num_weights']:,}",
            f"{point['val_loss']:.4f}",
            f"{point['perplexity']:.4g}",
            f"{100 * point['accuracy']:.2f} %",
        )
    return table
