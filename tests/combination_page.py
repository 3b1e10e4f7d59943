"""What docs/combinations.md says, and flags for its rows and columns."""

from __future__ import annotations

from pathlib import Path

from adarankgrad.train.combinations import Refusal

PAGE = Path(__file__).parents[1] / "docs" / "combinations.md"
DOTTED = "dotted path"
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "adarankgrad": {"optimizer": "adarankgrad"},
    "adarankgrad-low-memory": {"optimizer": "adarankgrad-low-memory", "precision": "bfloat16"},
    "adagrad-norm": {"optimizer": "adagrad-norm", "lr": 1e-2},
    DOTTED: {"optimizer": "torch.optim.Muon", "lr": 1e-2},
}
METHODS = {
    "--powerprop": {"powerprop": "alpha=2"},
    "--adadagrad": {"adadagrad": "max_batch_size=8,eta=0.5", "gradient_accumulation": 2},
    "--progressive-depth": {"progressive_depth": "layers=(1,2),starts=(0,32),unit=tokens"},
    "--extrapolation": {"extrapolation": "step=0.1"},
    "--accumulate-in-backward": {"accumulate_in_backward": True},
    "--activation-checkpointing": {"activation_checkpointing": True},
}

Pair = frozenset[str]


def _rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, the rule under its first row left out."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines
    ]
    return [rows[0], *rows[2:]]


def matrix(heading: str) -> dict[Pair, str]:
    """What the matrix under a heading says of each pair."""
    (_, *columns), *rows = _rows(heading)
    said = {
        frozenset((row[0], column)): word
        for row in rows
        for column, word in zip(columns, row[1:], strict=True)
        if word
    }
    assert set(said.values()) == {"yes", "in part", "no"}
    return said


def refused() -> list[list[str]]:
    """The rows of the table of what is refused."""
    return _rows("What is refused")[1:]


def pairs_with(said: dict[Pair, str], *words: str) -> set[Pair]:
    """The pairs of which the matrix says one of these words."""
    return {pair for pair, word in said.items() if word in words}


def flags_of(names: tuple[str, ...]) -> dict[str, object]:
    """Settings of a run with these optimizers and methods."""
    settings: dict[str, object] = {}
    for name in names:
        settings |= (OPTIMIZERS | METHODS)[name]
    return settings


def is_of_adapters(refusal: Refusal) -> bool:
    """Whether one of the two is a way to fine-tune."""
    return any(name.startswith("--method") for name in (refusal.first, refusal.second))
