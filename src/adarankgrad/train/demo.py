"""The demo: AdamW and AdaRankGrad train the same small LLaMA on Python's standard library.

Both runs get the same text, the same tokenizer settings, the same seed, hence the same initial
weights and order of data; only the optimizer and the rate of the projected weights differ. Each is
a process of its own (``python -m adarankgrad train ...``), so that each has its own peak memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from adarankgrad.train.child import ChildProcess
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.errors import Interrupted, TrainingError, UserError
from adarankgrad.train.files import is_writable_target, write_atomic
from adarankgrad.train.run_config import flag_of
from adarankgrad.train.stdlib_corpus import StdlibCorpus, read_stdlib

DEFAULT_STEPS = 500
MARKER_NAME = "demo.json"
_KIND = "adarankgrad demo"


@dataclass(frozen=True)
class DemoRun:
    """One of the runs that the demo compares.

    Attributes:
        label: Its name in tables and plots.
        optimizer: As for ``--optimizer``; also the name of its folder.
        lr: Learning rate of the projected weights; the best one differs between optimizers.
    """

    label: str
    optimizer: str
    lr: float


# Each the best of a grid on this text (docs/log.md); embeddings, head and norms share one rate.
PLAIN_LR = 1.6e-2
DEMO_RUNS = (DemoRun("AdamW", "adamw", 1e-3), DemoRun("AdaRankGrad", "adarankgrad", 4e-3))


@dataclass(frozen=True)
class Demo:
    """A demo to run.

    Args:
        output: Folder for data, runs and comparison.
        steps: Optimizer steps of each run.
        seed: Seed of both runs.
        overwrite: Write into ``output`` although it holds files that no demo wrote.
        settings: More settings of `TrainConfig` for both runs.
    """

    output: Path
    steps: int = DEFAULT_STEPS
    seed: int = 0
    overwrite: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    def run(
        self,
        say: Callable[[str], None] = lambda line: None,
        child_stdout: IO[Any] | None = None,
    ) -> dict[str, Any]:
        """Train with each optimizer and write the comparison.

        A folder that an earlier demo wrote is written again: its runs, data and comparison are
        replaced, anything else in it stays. Any other folder with files in it is refused unless
        ``overwrite`` is set, and even then no folder is emptied but those of training runs.

        Args:
            say: Told one line about each thing that happens.
            child_stdout: Where the standard output of training goes; by default to ours.

        Returns:
            ``output``, ``comparison`` (the page), and ``runs``: label to summary.

        Raises:
            UserError: The request cannot be met.
            TrainingError: A run failed; it has said why on stderr.
            Interrupted: A signal stopped a run; the comparison was not written.
        """
        from adarankgrad.train.comparison import write_comparison

        self._check()
        corpus = read_stdlib()
        data, validation = self._start_folder(corpus)
        say(
            f"{corpus.num_files} files of Python's standard library, "
            f"{corpus.num_bytes / 1e6:.1f} MB, are the text to learn."
        )
        for number, run in enumerate(DEMO_RUNS, start=1):
            say(f"Run {number} of {len(DEMO_RUNS)}: {run.label}, {self.steps} steps.")
            self._train(self.command(run, data, validation), run.label, child_stdout)
        page = write_comparison(self.run_dirs(), self.output, "AdamW and AdaRankGrad, the demo")
        result = {
            "output": str(self.output),
            "comparison": str(page),
            "runs": {
                label: json.loads((folder / "summary.json").read_text(encoding="utf-8"))
                for label, folder in self.run_dirs().items()
            },
        }
        self._mark(is_finished=True)
        return result

    def run_dirs(self) -> dict[str, Path]:
        """Return the run folders by label."""
        return {run.label: self.output / run.optimizer for run in DEMO_RUNS}

    def command(self, run: DemoRun, data: Path, validation: Path) -> list[str]:
        """Return the command of one run on two text files."""
        arguments = ["train"]
        for name, value in self._settings(run, data, validation).items():
            arguments += [flag_of(name), str(value)]
        if (self.output / run.optimizer).exists():
            arguments.append("--overwrite")
        return [sys.executable, "-m", "adarankgrad", *arguments]

    def _settings(self, run: DemoRun, data: Path, validation: Path) -> dict[str, Any]:
        return {
            "data": str(data),
            "validation": str(validation),
            "optimizer": run.optimizer,
            "lr": run.lr,
            "plain_lr": PLAIN_LR,
            "steps": self.steps,
            "seq_len": 128,
            "batch_size": 8,
            "seed": self.seed,
            "eval_every": max(1, self.steps // 6),
            "save_every": max(1, self.steps // 2),
            "log_every": max(1, self.steps // 60),
            **dict(self.settings),
            "output": str(self.output / run.optimizer),
        }

    def _check(self) -> None:
        for run in DEMO_RUNS:
            TrainConfig.from_settings(self._settings(run, Path("train"), Path("validation")))
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"output {self.output} is a file: name a folder.")
        is_used = self.output.is_dir() and any(self.output.iterdir())
        if is_used and not self.overwrite and not _is_demo(self.output):
            raise UserError(
                f"output {self.output} holds files that no demo wrote: name another folder, or add "
                f"--overwrite to write {', '.join(run.optimizer for run in DEMO_RUNS)}, data, "
                "plots and comparison.html into it."
            )
        if not is_writable_target(self.output):
            raise UserError(f"output {self.output} cannot be written: name another folder.")

    def _start_folder(self, corpus: StdlibCorpus) -> tuple[Path, Path]:
        """Write the text, after the marker that tells a demo's folder from others."""
        self.output.mkdir(parents=True, exist_ok=True)
        self._mark(is_finished=False)
        (self.output / "comparison.html").unlink(missing_ok=True)
        return corpus.write(self.output / "data")

    def _mark(self, *, is_finished: bool) -> None:
        content = {
            "kind": _KIND,
            "is_finished": is_finished,
            "steps": self.steps,
            "seed": self.seed,
        }
        write_atomic(self.output / MARKER_NAME, json.dumps(content) + "\n")

    def _train(self, command: list[str], label: str, child_stdout: IO[Any] | None) -> None:
        try:
            exit_code = ChildProcess(command, child_stdout).run()
        except Interrupted as error:
            raise Interrupted(
                f"the demo was stopped during the {label} run; start it again with "
                f"`adarankgrad demo --output {self.output}`.",
                error.exit_code,
            ) from error
        if exit_code != 0:
            raise TrainingError(
                f"the {label} run of the demo ended with exit code {exit_code}; what it said is "
                "above."
            )


def _is_demo(folder: Path) -> bool:
    try:
        marker = json.loads((folder / MARKER_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("kind") == _KIND
