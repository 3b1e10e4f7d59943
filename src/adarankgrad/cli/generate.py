"""``adarankgrad generate``: a quick look at what a language model writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from adarankgrad.train.errors import UserError


def generate(
    model: Annotated[
        Path, typer.Option(help="Folder of a model, a peft adapter, or a finished run.")
    ],
    prompt: Annotated[
        str,
        typer.Option(help="Text to continue; - reads it from standard input.", metavar="TEXT|-"),
    ],
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the tokenizer's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above, tokens are sampled.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Share of probability to sample from, in (0, 1].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the folder brings along.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text and token counts as one JSON object.")
    ] = False,
) -> None:
    """Print what a causal language model writes after a prompt.

    Example: adarankgrad generate --model models/smollm2 --chat --prompt "What is a lathe?"
    """
    from adarankgrad.generate.request import GenerateRequest

    request = GenerateRequest(
        model.expanduser(),
        _read_prompt() if prompt == "-" else prompt,
        chat,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        device,
        trust_remote_code,
    )

    from adarankgrad.generate.generate import generate_text

    result = generate_text(request)
    print(json.dumps(result) if as_json else result["text"])


def _read_prompt() -> str:
    """Return standard input without the line break that a shell adds at its end."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not text in {error.encoding}.") from error
