"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adarankgrad.train.record import projects
from adarankgrad.train.units import (
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_share,
)

_NOT_SHOWN = ("step", "tokens", "training_flops", "val_loss")


class Display:
    """Writes to one console; without one it stays silent.

    Args:
        console: Where to write, normally stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._numbers = ""

    def say(self, message: str) -> None:
        """Write one line."""
        if self.console is not None:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def start(self, num_steps: int, step: int) -> None:
        """Begin to show progress, from a step on."""
        if self.console is None or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self._progress.add_task("training", total=num_steps, completed=step)
        self._progress.start()

    def advance(self, step: int) -> None:
        """Show that a step is done."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def show_step(self, row: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        numbers = step_numbers(row)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=numbers)
        else:
            self.say(f"step {row['step']}  {numbers}")

    def show_evaluation(self, row: dict[str, Any]) -> None:
        """Show an evaluation."""
        others = {name: row[name] for name in row if name not in _NOT_SHOWN}
        self.say(
            f"step {row['step']}  validation loss {row['val_loss']:.4f}"
            + "".join(f"  {name.replace('_', ' ')} {others[name]:.4g}" for name in others)
        )

    def stop(self) -> None:
        """End the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def show_summary(self, summary: dict[str, Any]) -> None:
        """Show the table at the end of a run."""
        if self.console is not None:
            self.console.print(summary_table(summary))


def step_numbers(row: dict[str, Any]) -> str:
    """Return loss, learning rate, speed, rank and optimizer memory in one line."""
    rank = "" if row["mean_rank"] is None else f"  rank {row['mean_rank']:.1f}"
    batch = f"  batch {row['batch_size']}" if "batch_size" in row else ""
    return (
        f"loss {row['loss']:.4f}  lr {row['lr']:.1e}  {row['tokens_per_second']:,.0f} tokens/s"
        f"{batch}{rank}  state {row['state_bytes'] / 2**20:.2f} MiB"
    )


def _metrics(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return perplexity, or the metrics of a task but for its loss, by name."""
    metrics = summary.get("metrics", {"perplexity": summary["perplexity"]})
    return [
        (name.replace("_", " "), format_number(value, 2 if name == "perplexity" else 4))
        for name, value in metrics.items()
        if name != "loss"
    ]


def _state(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is trained, where that is told, what the optimizer holds, and what of it."""
    rows = [("optimizer state", format_bytes(summary["state_bytes"]))]
    trained = summary.get("trainable_parameters")
    if trained is not None:
        share = format_share(trained, summary["base_parameters"])
        rows.insert(0, ("trained weights", f"{format_count(trained)} ({share})"))
    if "surviving_parameters" in summary:
        rows.insert(1, ("  left of A and B", format_count(summary["surviving_parameters"])))
    if not projects(summary):
        return rows
    projected, adamw = summary["projected_state_bytes"], summary["adamw_projected_state_bytes"]
    return [
        *rows,
        ("  of projected weights", format_bytes(projected)),
        ("  as a share of AdamW's", format_share(projected, adamw)),
        ("mean rank", format_number(summary["mean_rank"], 1)),
    ]


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the numbers of a finished run as a table."""
    method = summary.get("method", "full")
    adapter = "" if method == "full" else f"{method}, "
    title = f"{adapter}{summary['optimizer']}, {summary['steps']} steps"
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    batch = summary.get("batch_size")
    for name, value in (
        ("training tokens", format_count(summary["tokens"])),
        *([] if batch is None else [("batch at the end", format_count(batch))]),
        ("training operations", format_count(summary["training_flops"])),
        ("training loss", format_number(summary["train_loss"])),
        ("validation loss", format_number(summary["val_loss"])),
        *_metrics(summary),
        ("skipped steps", format_count(summary["skipped_steps"])),
        *_state(summary),
        (f"peak memory ({summary['peak_bytes_source']})", format_bytes(summary["peak_bytes"])),
        ("tokens per second", format_count(summary["tokens_per_second"])),
        ("time in the optimizer", format_seconds(summary["optimizer_s"])),
        ("time in all", format_seconds(summary["elapsed_s"])),
        ("model", summary["paths"]["model"]),
        ("report", summary["paths"]["report"]),
    ):
        table.add_row(name, value)
    return table
