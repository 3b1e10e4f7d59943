"""The report of a run: one HTML file with numbers, plots, layers, settings and the command.

It needs nothing else: images and styles are inside, so it can be mailed or put on a server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adarankgrad.train import page
from adarankgrad.train.figure_style import DARK, LIGHT, to_png
from adarankgrad.train.files import write_atomic
from adarankgrad.train.plots import caption_of, plot_makers
from adarankgrad.train.record import RunRecord, load_run, short_layer_names
from adarankgrad.train.units import (
    ABSENT,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_share,
)

REASONS = {
    "first": "the first step",
    "max_gap": "the longest gap between refreshes was over",
    "norm": "the projected gradient had converged",
    "energy": "the basis no longer captured the gradient",
    "none": "no refresh yet",
}

_PLOT_NOTES = {
    "loss": "Training and validation loss over the tokens seen, on a logarithmic axis.",
    "loss_over_operations": (
        "The same over the floating-point operations of forward and backward passes, by formula. "
        "While the depth grows, validation runs the layers there are, once each."
    ),
    "metric": "What the task is judged by, on the validation examples.",
    "memory": (
        "What training holds from step to step, and the same parts inside the measured peak. "
        "The rest of the peak is activations, workspace and, on CPU, the process itself."
    ),
    "batch": (
        "Samples in a step, and the noise scale of its gradient: the batch at which noise and "
        "gradient are equally long, an average of the tests since the last logged step. It is "
        "not measured any more once the batch is at its cap."
    ),
    "ranks": (
        "The number of basis vectors of every projected weight at every logged step, in the "
        "order of the model's layers."
    ),
}

_COUNTS = ("step", "tokens", "training_flops")
"""Of an evaluation's line: how far training was, beside what was found."""

_PLOT_TITLES = {
    "loss": "Loss",
    "metric": "Metrics over steps",
    "loss_over_operations": "Loss over operations",
    "memory": "Memory",
    "batch": "Batch size",
    "ranks": "Ranks over time",
}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a finished run.

    Args:
        run_dir: The run folder; ``summary.json`` must be there.

    Returns:
        The file written.

    Raises:
        UserError: The folder is not a finished run.
    """
    run = load_run(run_dir)
    path = run.path / "report.html"
    write_atomic(path, page.page(_title(run), _opening(run), _sections(run)))
    return path


def headline_tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return the numbers to see first: name, value, and what to compare it with."""
    summary = run.summary
    entries = [
        (
            "Validation loss",
            format_number(summary.get("val_loss"), 3),
            _beside_loss(summary),
        ),
        *_state_tiles(run),
        (
            "Peak memory",
            format_bytes(summary.get("peak_bytes")),
            str(summary.get("peak_bytes_source", "")),
        ),
        (
            "Speed",
            format_count(summary.get("tokens_per_second")),
            f"tokens per second; {format_seconds(summary.get('elapsed_s'))} in all",
        ),
        (
            "Time in the optimizer",
            format_seconds(summary.get("optimizer_s")),
            f"{format_share(summary.get('optimizer_s'), summary.get('elapsed_s'))} of the run",
        ),
    ]
    if run.mean_ranks:
        first, last = run.mean_ranks[0], run.mean_ranks[-1]
        entries.insert(2, ("Mean rank", format_number(last, 1), f"{first:.1f} at the first log"))
    if run.batch_sizes:
        first, last = run.batch_sizes[0], run.batch_sizes[-1]
        steps = f"samples; {first} at the start, {format_count(run.summary.get('steps'))} steps"
        entries.insert(1, ("Batch at the end", format_count(last), steps))
    return entries


def _state_tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return what the optimizer holds, and of projected weights, where there are any."""
    summary = run.summary
    trained = summary.get("trainable_parameters")
    if run.projects:
        note = "embeddings, head and norms included"
    elif trained is None:
        note = "of every weight"
    else:
        share = format_share(trained, summary["base_parameters"])
        note = f"of {format_count(trained)} trained weights, {share} of the model's"
    tiles = [("Optimizer state in all", format_bytes(summary.get("state_bytes")), note)]
    if run.projects:
        projected, adamw = (
            summary["projected_state_bytes"],
            summary["adamw_projected_state_bytes"],
        )
        share = f"{format_share(projected, adamw, 0)} of AdamW's {format_bytes(adamw)}"
        tiles.insert(0, ("State of projected weights", format_bytes(projected, adamw), share))
    return tiles


def _beside_loss(summary: dict[str, Any]) -> str:
    """Return the task's metric, where the run has a task, else the perplexity."""
    metric = summary.get("best_metric", "loss")
    if metric == "loss":
        return f"perplexity {format_number(summary.get('perplexity'), 1)}"
    return f"{metric} {format_number(summary['metrics'][metric], 3)}, at the best checkpoint"


def plot_images(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Draw the figures of a run as HTML, by name, for light and dark paper."""
    for name, draw in plot_makers(run).items():
        light, dark = (to_png(draw(theme), caption_of(run)) for theme in (LIGHT, DARK))
        yield name, page.image(name, light, dark, _PLOT_NOTES[name])


def reproduction(run: RunRecord) -> str:
    """Return the command and the versions that repeat a run, as HTML."""
    info = run.info
    facts = [(str(name), str(value)) for name, value in dict(info.get("versions") or {}).items()]
    known = ("commit", "device", "dtype", "created")
    facts += [(name, str(info[name])) for name in known if info.get(name)]
    return page.code_block(run.command or ABSENT) + page.definitions(facts)


def _title(run: RunRecord) -> str:
    task = run.summary.get("task")
    what = f"fine-tuned for {task}" if task else "a language model trained"
    return f"{run.path.resolve().name}: {what} with {run.method}"


def _opening(run: RunRecord) -> str:
    summary = run.summary
    parameters = format_count(run.info.get("model_parameters"))
    text = (
        f"{parameters} parameters, {format_count(summary.get('tokens'))} tokens in "
        f"{format_count(summary.get('steps'))} steps, {format_seconds(summary.get('elapsed_s'))} "
        f"on {run.info.get('device', 'an unknown device')}."
    )
    projected, adamw = (
        summary.get("projected_state_bytes"),
        summary.get("adamw_projected_state_bytes"),
    )
    if run.layers and projected is not None and adamw:
        text += (
            f" For the {len(run.layers)} projected weights the optimizer holds "
            f"{format_bytes(projected, adamw)} where AdamW would hold {format_bytes(adamw)}."
        )
    if summary.get("skipped_steps"):
        count = format_count(summary["skipped_steps"])
        text += f" {count} steps were skipped, because their gradients were not finite."
    return text


def _sections(run: RunRecord) -> Iterator[str]:
    yield page.tiles(headline_tiles(run))
    images = dict(plot_images(run))
    for name, title in _PLOT_TITLES.items():
        if name in images:
            note = page.paragraph(_PLOT_NOTES[name])
            yield page.section(title, note, images[name], is_half=name != "ranks")
    if run.summary.get("task"):
        yield page.section("Evaluations", *_evaluations(run))
    if run.layers:
        yield page.section("Layers at the end", *_layers(run))
    yield page.section("Settings", page.definitions(_flatten(run.config)))
    yield page.section("Run it again", reproduction(run))


def _evaluations(run: RunRecord) -> Iterator[str]:
    best = run.summary["best_step"]
    yield page.paragraph(
        f"The model is that of step {best}, the best by {run.summary['best_metric']}."
    )
    names = [name for name in run.evals[0] if name not in _COUNTS]
    heads = ["Step", *(name.replace("val_", "validation ").replace("_", " ") for name in names)]
    rows = [
        [str(row["step"]), *(format_number(row[name], 4) for name in names)] for row in run.evals
    ]
    yield page.table(heads, rows)


def _layers(run: RunRecord) -> Iterator[str]:
    layers = run.layers
    reasons = Counter(str(layer["refresh_reason"]) for layer in layers)
    refreshes = sum(layer["num_refreshes"] for layer in layers)
    skipped = sum(layer["num_skipped_refreshes"] for layer in layers)
    listed = "; ".join(
        f"{REASONS.get(reason, reason)} ({count} of {len(layers)} weights)"
        for reason, count in reasons.most_common()
    )
    yield page.paragraph(
        f"{refreshes} refreshes in all, {skipped} skipped for a zero or non-finite gradient. "
        f"Why each basis was last refreshed: {listed}."
    )
    names = short_layer_names([layer["name"] for layer in layers])
    yield page.table(
        [
            "Weight",
            "Rank",
            "Ceiling",
            "Captured energy",
            "Refreshes",
            "Skipped",
            "Last reason",
            "Steps since",
            "Shape",
        ],
        [_layer_row(name, layer) for name, layer in zip(names, layers, strict=True)],
    )
    if run.info.get("describe"):
        yield page.fold(
            "What is projected, and what it saves",
            page.code_block(str(run.info["describe"]), wraps=False),
        )


def _layer_row(name: str, layer: dict[str, Any]) -> list[str]:
    return [
        name,
        str(layer["rank"]),
        str(layer["max_rank"]),
        format_share(layer["captured_energy"], 1.0),
        str(layer["num_refreshes"]),
        str(layer["num_skipped_refreshes"]),
        str(layer["refresh_reason"]),
        str(layer["steps_since_refresh"]),
        " x ".join(str(size) for size in layer["shape"]),
    ]


def _flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
