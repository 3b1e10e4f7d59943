"""A run whose batch grows shows it: in its plots, its report and on the console."""

import json

import pytest
from fake_run import write_fake_run

from adarankgrad.train.batch_figure import batch_figure
from adarankgrad.train.display import step_numbers, summary_table
from adarankgrad.train.files import read_jsonl
from adarankgrad.train.plots import write_plots
from adarankgrad.train.record import load_run
from adarankgrad.train.report import write_report

SIZES, SCALES = (8, 8, 24, 96), (3.5, None, 40.0, None)


@pytest.fixture
def run_dir(tmp_path):
    folder = write_fake_run(tmp_path / "run", "adamw", num_logs=4, batch_size=96)
    rows = read_jsonl(folder / "metrics.jsonl")
    logged = [row for row in rows if "loss" in row]
    for row, size, scale in zip(logged, SIZES, SCALES, strict=True):
        row.update(batch_size=size, noise_scale=scale)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_figure_draws_sizes_and_the_scales_that_were_measured(run_dir):
    run = load_run(run_dir)
    axes = batch_figure(run, "caption").axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    tokens = [row["tokens"] for row in run.train]
    assert list(lines["batch size"].get_ydata()) == list(SIZES)
    assert list(lines["noise scale"].get_xdata()) == [tokens[0], tokens[2]]
    assert list(lines["noise scale"].get_ydata()) == [3.5, 40.0]
    assert axes.get_ylabel() == "samples" and axes.get_xlabel() == "training tokens"


def test_plots_and_report_have_it_and_those_of_other_runs_do_not(run_dir, tmp_path):
    assert "batch.png" in [path.name for path in write_plots(run_dir)]
    page = write_report(run_dir).read_text()
    assert "Batch at the end" in page and "noise scale of its gradient" in page
    plain = write_fake_run(tmp_path / "plain", "adamw", num_logs=4)
    assert "Batch at the end" not in write_report(plain).read_text()


def test_the_console_shows_it(run_dir):
    run = load_run(run_dir)
    assert "  batch 24  " in step_numbers(run.train[2])
    summary = run.summary | {"skipped_steps": None, "training_flops": None}
    names = list(summary_table(summary).columns[0].cells)
    assert "batch at the end" in names
    del summary["batch_size"]
    assert "batch at the end" not in list(summary_table(summary).columns[0].cells)
