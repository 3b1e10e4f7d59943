"""Plots of a run folder: which files appear, that they hold a picture, and what they say."""

import io
import math

import numpy as np
import pytest
from fake_run import write_fake_run
from matplotlib.image import imread

from adarankgrad.train.errors import UserError
from adarankgrad.train.figure_style import METHOD_COLOURS, method_colour
from adarankgrad.train.figures import loss_figure, memory_figure, ranks_figure
from adarankgrad.train.plots import write_plots
from adarankgrad.train.record import METHOD_NAMES, load_run, short_layer_names
from adarankgrad.train.units import format_bytes, format_count, format_seconds


def test_a_run_with_ranks_gets_three_pictures(tmp_path):
    run_dir = write_fake_run(tmp_path / "run")
    paths = write_plots(run_dir)
    assert sorted(path.name for path in paths) == ["loss.png", "memory.png", "ranks.png"]
    for path in paths:
        pixels = imread(io.BytesIO(path.read_bytes()))
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique(pixels[::4, ::4, 2])) > 20
    assert sorted(path.name for path in (run_dir / "plots").iterdir()) == sorted(
        path.name for path in paths
    )


def test_adamw_gets_no_ranks_picture(tmp_path):
    paths = write_plots(write_fake_run(tmp_path / "run", "adamw"))
    assert sorted(path.name for path in paths) == ["loss.png", "memory.png"]


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run_dir = write_fake_run(tmp_path / "run", num_logs=3)
    first = [path.read_bytes() for path in write_plots(run_dir)]
    assert [path.read_bytes() for path in write_plots(run_dir)] == first


def test_an_unfinished_run_is_refused_with_what_to_do(tmp_path):
    run_dir = write_fake_run(tmp_path / "run")
    (run_dir / "summary.json").unlink()
    with pytest.raises(UserError, match="not a finished run.*--resume"):
        write_plots(run_dir)


def test_the_loss_figure_has_units_and_draws_validation_where_it_was_measured(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run"))
    axes = loss_figure({run.method: run}, "caption").axes[0]
    assert axes.get_xlabel() == "training tokens"
    assert axes.get_ylabel() == "loss (nats per token)"
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["validation"].get_xdata()) == [row["tokens"] for row in run.evals]
    assert lines["validation"].get_color() == METHOD_COLOURS["AdaRankGrad"]


def test_a_loss_that_is_not_finite_or_missing_does_not_stop_the_figure(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run", num_logs=2))
    run.train[-1]["loss"] = math.nan
    loss_figure({"a": run}, "caption").canvas.draw()
    run.train.clear()
    run.evals.clear()
    loss_figure({"a": run}, "caption").canvas.draw()


def test_two_runs_of_one_method_share_its_colour_and_differ_in_line_style(tmp_path):
    runs = {name: load_run(write_fake_run(tmp_path / name)) for name in ("one", "two")}
    lines = loss_figure(runs, "caption").axes[0].get_lines()
    validation = [line for line in lines if line.get_label().endswith("validation")]
    assert len({line.get_color() for line in validation}) == 1
    assert len({line.get_linestyle() for line in validation}) == 2


def test_the_heat_map_shows_every_layer_in_model_order_and_every_logged_rank(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run", num_logs=5))
    axes = ranks_figure(run, "caption").axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:2] == ["0.q_proj", "0.k_proj"] and labels[7] == "1.q_proj"
    expected = [[record["layers"][row]["rank"] for record in run.ranks] for row in range(14)]
    assert axes.collections[0].get_array().reshape(14, 5).tolist() == expected
    assert axes.yaxis_inverted()


def test_a_single_logged_step_and_a_deep_model_make_a_heat_map_too(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run", num_logs=1, num_blocks=60))
    figure = ranks_figure(run, "caption")
    assert len(figure.axes[0].get_yticklabels()) <= 60
    assert figure.get_figheight() < 11


def test_the_memory_figure_shows_adamw_state_beside_the_run_and_adds_up_to_the_peak(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run"))
    upper, lower = memory_figure({run.method: run}, "caption").axes
    assert [label.get_text() for label in upper.get_yticklabels()] == [
        "AdaRankGrad",
        "with AdamW's\nstate instead",
    ]
    widths = [bar.get_width() for bar in upper.patches]
    mib = 2**20
    assert widths[2] == pytest.approx(860_000 / mib)
    assert widths[6] == pytest.approx(run.summary["adamw_projected_state_bytes"] / mib)
    total = sum(bar.get_width() for bar in lower.patches)
    assert total == pytest.approx(run.summary["peak_bytes"] / mib)
    assert "process resident set" in lower.get_title("left")


def test_the_memory_of_a_run_that_projects_nothing_is_not_divided_unless_it_is_beside_another(
    tmp_path,
):
    run = load_run(write_fake_run(tmp_path / "run", "adamw"))
    alone = memory_figure({"AdamW": run}, "").axes[0]
    assert [label.get_text() for label in alone.get_yticklabels()] == ["AdamW"]
    labels = [bar.get_label() for bar in alone.containers]
    assert labels == ["weights", "gradients", "optimizer state"]
    beside = memory_figure({"AdamW": run, "again": run}, "").axes[0]
    assert "state of projected weights" in [bar.get_label() for bar in beside.containers]


def test_a_peak_smaller_than_its_parts_leaves_no_negative_rest(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run", peak_bytes=1000))
    widths = [bar.get_width() for bar in memory_figure({"a": run}, "").axes[1].patches]
    assert min(widths) == 0


def test_every_named_method_has_a_colour_of_its_own():
    colours = [method_colour(name) for name in METHOD_NAMES.values()]
    assert len(set(colours)) == len(colours)
    assert method_colour("anything else") == method_colour("anything else")


def test_layer_names_keep_what_tells_layers_apart():
    llama = ["model.layers.0.self_attn.q_proj.weight", "model.layers.11.mlp.up_proj.weight"]
    assert short_layer_names(llama) == ["0.q_proj", "11.up_proj"]
    gpt = ["transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight"]
    assert short_layer_names(gpt) == ["0.attn.c_proj", "0.mlp.c_proj"]
    assert short_layer_names(["weight"]) == ["weight"]
    assert short_layer_names([]) == []


def test_a_step_logged_again_after_a_resume_counts_once_with_its_later_value(tmp_path):
    run_dir = write_fake_run(tmp_path / "run", num_logs=2)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "tokens": 40960, "loss": 9.5}\n{"step": 2')
    run = load_run(run_dir)
    assert [(row["step"], row["loss"]) for row in run.train][-1] == (20, 9.5)
    assert len(run.train) == 2


def test_a_damaged_summary_is_named(tmp_path):
    run_dir = write_fake_run(tmp_path / "run", num_logs=1)
    (run_dir / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json is not valid JSON"):
        load_run(run_dir)


def test_a_command_is_shown_without_the_paths_of_this_machine(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run", num_logs=1))
    run.info["command"] = ["/somewhere/adarankgrad/__main__.py", "train", "--data", "a b"]
    assert run.command == "python -m adarankgrad train --data 'a b'"
    run.info["command"] = ["/usr/bin/adarankgrad", "train"]
    assert run.command == "adarankgrad train"
    run.info.clear()
    assert run.command == ""


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1536, "1.50 KiB"),
        (6_291_456, "6.00 MiB"),
        (1023.9 * 2**20, "1.00 GiB"),
        (None, "n/a"),
    ],
)
def test_bytes_have_three_digits_and_a_binary_unit(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_a_size_can_share_the_unit_of_a_larger_one():
    assert format_bytes(860_000, beside=6_291_456) == "0.820 MiB"
    assert format_bytes(6_291_456, beside=860_000) == "6.00 MiB"
    assert format_bytes(859 * 2**20, beside=876 * 2**20) == "859 MiB"


def test_counts_and_durations_are_short():
    assert [format_count(x) for x in (0, 600, 1_840_000, 999_900)] == [
        "0",
        "600",
        "1.84 M",
        "1.00 M",
    ]
    assert [format_seconds(x) for x in (0.04, 59.9, 59.96, 125, 3720)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 02 min",
    ]
