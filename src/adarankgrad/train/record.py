"""A finished run folder, read back: everything that plots, reports and comparisons use."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarankgrad.train.errors import UserError
from adarankgrad.train.files import read_jsonl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHOD_NAMES = {
    "adagrad-norm": "AdaGradNorm",
    "adamw": "AdamW",
    "adarankgrad": "AdaRankGrad",
    "adarankgrad-low-memory": "AdaRankGrad (low memory)",
    "adarankgrad-published": "AdaRankGrad (published)",
    "apollo": "Apollo",
    "fira": "Fira",
    "galore": "GaLore",
    "lora": "LoRA",
    "muon": "Muon",
    "orthogonalized-sgd": "Orthogonalized SGD",
    "prilora": "PRILoRA",
    "sara": "SaRA",
    "sgd": "SGD",
    "sora": "SoRA",
}

_OF_THE_LOSS = ("loss", "perplexity")


def method_name(optimizer: str) -> str:
    """Return an optimizer's name as people write it, given ``--optimizer``."""
    return METHOD_NAMES.get(optimizer.lower(), optimizer.rpartition(".")[2])


def projects(summary: dict[str, Any]) -> bool:
    """Whether a run's optimizer projected any weight, given summary.json."""
    return summary.get("mean_rank") is not None and bool(summary["adamw_projected_state_bytes"])


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind, in memory.

    Attributes:
        path: The run folder.
        config: ``config.toml``: every setting, resolved.
        info: ``run.json``: command line, versions, device, model.
        train: Logged steps of ``metrics.jsonl``, by step.
        evals: Evaluations of ``metrics.jsonl``, by step.
        ranks: ``ranks.jsonl``, by step; empty for optimizers without ranks.
        summary: ``summary.json``.
    """

    path: Path
    config: dict[str, Any]
    info: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def optimizer(self) -> str:
        """The optimizer's key, such as ``adarankgrad``."""
        return str(self.summary.get("optimizer", self.config.get("optimizer", "unknown")))

    @property
    def method(self) -> str:
        """The name of adapter or optimizer as people write it, such as ``AdaRankGrad``."""
        adapter = self.config.get("method", "full")
        return method_name(self.optimizer if adapter == "full" else adapter)

    @property
    def projects(self) -> bool:
        """Whether weights were projected, so that their state compares with AdamW's."""
        return projects(self.summary)

    @property
    def has_growing_depth(self) -> bool:
        """Whether steps differ in depth, so that operations are not proportional to tokens."""
        return bool(self.config.get("progressive_depth"))

    @property
    def command(self) -> str:
        """The command line that made the run, as typed into a shell."""
        command = self.info.get("command", "")
        if not isinstance(command, list) or not command:
            return str(command or "")
        program, *arguments = map(str, command)
        # `python -m adarankgrad` and an installed script are known to Python by their full paths.
        name = Path(program).name
        start = "python -m adarankgrad" if name == "__main__.py" else shlex.quote(name)
        return f"{start} {shlex.join(arguments)}".rstrip()

    @property
    def commit(self) -> str:
        """The commit of the code that ran, empty where unknown."""
        return str(self.info.get("commit") or "")

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The last logged state of every projected matrix, in model order."""
        return list(self.ranks[-1]["layers"]) if self.ranks else []

    @property
    def mean_ranks(self) -> list[float]:
        """The logged mean ranks, first to last; empty for optimizers without ranks."""
        return [row["mean_rank"] for row in self.train if row.get("mean_rank") is not None]

    @property
    def batch_sizes(self) -> list[int]:
        """The logged batch sizes in samples, first to last; empty where the batch cannot grow."""
        return [row["batch_size"] for row in self.train if "batch_size" in row]

    @property
    def task_metrics(self) -> list[str]:
        """Metrics of validation but for the loss, first that of the best checkpoint."""
        best = self.summary.get("best_metric")
        names = [name for name in self.summary.get("metrics") or () if name not in _OF_THE_LOSS]
        logged = [name for name in names if all(name in row for row in self.evals)]
        return sorted(logged, key=lambda name: name != best) if self.evals else []

    def flops_to_loss(self, loss: float) -> float | None:
        """Return the operations after which the validation loss first was as low as this.

        Args:
            loss: To reach, for example the last one of a run at full depth.

        Returns:
            By a straight line between the evaluations before and after; None where it was not
            reached, or operations were not counted.
        """
        if any(row.get("training_flops") is None for row in self.evals):
            return None
        return count_to_loss(self.evals, loss, "training_flops")


def count_to_loss(rows: Sequence[Mapping[str, Any]], loss: float, over: str) -> float | None:
    """Return where the validation loss first was as low as this.

    Args:
        rows: Evaluations, with ``val_loss`` and what is counted.
        loss: To reach, in nats.
        over: The name of what is counted.

    Returns:
        By a straight line between the evaluations before and after; None where it was not reached.
    """
    before: Mapping[str, Any] | None = None
    for row in rows:
        if row["val_loss"] <= loss:
            if before is None:
                return float(row[over])
            share = (before["val_loss"] - loss) / (before["val_loss"] - row["val_loss"])
            return float(before[over] * (1 - share) + share * row[over])
        before = row
    return None


def load_run(run_dir: Path) -> RunRecord:
    """Read a finished run folder.

    Args:
        run_dir: The folder that ``adarankgrad train --output`` wrote.

    Raises:
        UserError: The folder or its ``summary.json`` is missing, or a file cannot be parsed.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "summary.json").is_file():
        raise UserError(
            f"{run_dir} is not a finished run: it has no summary.json. Finish the training "
            "(`adarankgrad train --resume`) or name another folder."
        )
    metrics = _lines(run_dir / "metrics.jsonl")
    return RunRecord(
        path=run_dir,
        config=_toml(run_dir / "config.toml"),
        info=_json(run_dir / "run.json"),
        train=_by_step([row for row in metrics if "loss" in row]),
        evals=_by_step([row for row in metrics if "val_loss" in row]),
        ranks=_by_step(_lines(run_dir / "ranks.jsonl")),
        summary=_json(run_dir / "summary.json"),
    )


def short_layer_names(names: list[str]) -> list[str]:
    """Return parameter names without the parts that do not tell layers apart.

    ``model.layers.0.self_attn.q_proj.weight`` becomes ``0.q_proj`` where block number and last
    part are enough, and ``0.attn.c_proj`` where they are not.
    """
    parts = [name.removesuffix(".weight").split(".") for name in names]
    numbers_and_last = [
        ".".join([part for part in path[:-1] if part.isdigit()] + path[-1:]) for path in parts
    ]
    if len(set(numbers_and_last)) == len(set(names)):
        return numbers_and_last
    in_every_name = set(parts[0][:-1]).intersection(*(path[:-1] for path in parts[1:]))
    return [
        ".".join(
            [part for part in path[:-1] if part.isdigit() or part not in in_every_name] + path[-1:]
        )
        for path in parts
    ]


def _by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows by step; of a step logged twice (before and after a resume) keep the later."""
    latest = {row["step"]: row for row in rows}
    return [latest[step] for step in sorted(latest)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): train again or restore it."
        ) from error


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(
            f"{path} is not valid TOML ({error}): train again or restore it."
        ) from error
