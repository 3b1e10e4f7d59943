"""A comparison in which depth grows: what each method took to the loss of the first one."""

import math
from dataclasses import replace

import pytest
from fake_run import write_counted_run

from adarankgrad.compare.figures import validation_figure
from adarankgrad.compare.plan import make_plan
from adarankgrad.compare.report import results_table, write_results
from adarankgrad.compare.results import collect
from adarankgrad.compare.run import compare
from adarankgrad.train.files import read_jsonl

STAGES = {"layers": [1, 2], "starts": [0, 4]}
TO_LOSS = "Operations to the loss of full"
SEEDS = (0, 1, 2)
NUM_TOKENS = 80 * 2048
OUT_OF_REACH = 1.0


@pytest.fixture
def make(tmp_path):
    """Write a finished comparison; the first method ends lower than the other at some seeds."""
    (tmp_path / "text.txt").write_text("words")

    def build(is_growing=True, is_counted=True, out_of_reach=()):
        methods = {"full": {"optimizer": "adamw"}, "growing": {"optimizer": "adamw"}}
        settings = {"data": str(tmp_path / "text.txt"), "methods": methods, "seeds": list(SEEDS)}
        plan = make_plan(tmp_path / "cmp", settings)
        for cell in plan.all_possible_cells():
            is_full = cell.method.label == "full"
            per_token = 100 if is_full else 50
            for seed in SEEDS:
                lower = {"val_loss": OUT_OF_REACH} if is_full and seed in out_of_reach else {}
                write_counted_run(
                    plan.run_dir(replace(cell, seed=seed)),
                    per_token=per_token,
                    is_growing=is_growing and not is_full,
                    training_flops=per_token * NUM_TOKENS if is_counted else None,
                    **lower,
                )
        return plan

    return build


def cells_of(plan):
    """The cells of the printed table by method and title."""
    columns = {str(column.header): list(column.cells) for column in results_table(plan).columns}
    return {
        label: {title: cells[place] for title, cells in columns.items()}
        for place, label in enumerate(columns["Method"])
    }


def test_the_loss_of_the_first_method_is_priced_in_its_own_operations(make):
    plan = make()
    full, growing = write_results(plan)["methods"]
    assert (full["training_flops"], growing["training_flops"]) == (16_384_000, 8_192_000)
    assert full["flops_to_loss"]["ratio"] == 1
    expected = {"of": "full", "median": 8_192_000, "ratio": 0.5}
    expected["by_seed"] = dict.fromkeys(map(str, SEEDS), 8_192_000)
    assert growing["flops_to_loss"] == expected
    cells = cells_of(plan)
    assert cells["full"][TO_LOSS] == "× 1.00"
    assert (cells["growing"]["Operations"], cells["growing"][TO_LOSS]) == ("8.19 M", "× 0.50")
    html = (plan.output / "report.html").read_text(encoding="utf-8")
    assert TO_LOSS in html and "× 0.50" in html and "Loss over operations" in html
    assert (plan.output / "plots" / "loss_over_operations.png").exists()


@pytest.mark.parametrize(
    ("out_of_reach", "ratio", "text"),
    [
        ([1], 0.5, "× 0.50 (2 of 3 seeds)"),
        ([0, 2], None, "not reached"),
        (SEEDS, None, "not reached"),
    ],
)
def test_a_seed_that_never_gets_there_counts_as_dearer_than_any(make, out_of_reach, ratio, text):
    plan = make(out_of_reach=out_of_reach)
    growing = write_results(plan)["methods"][1]["flops_to_loss"]
    assert growing["ratio"] == ratio
    assert [growing["by_seed"][str(seed)] for seed in out_of_reach] == [None] * len(out_of_reach)
    assert "Infinity" not in (plan.output / "results.json").read_text()
    html = (plan.output / "report.html").read_text(encoding="utf-8")
    assert cells_of(plan)["growing"][TO_LOSS] == text and text in html
    assert (f"{3 - len(out_of_reach)} of 3 seeds" in html) == (len(out_of_reach) < 3)


def test_without_growing_depth_nothing_is_added(make):
    plan = make(is_growing=False)
    assert "flops_to_loss" not in write_results(plan)["methods"][0]
    assert not any("Operations" in title for title in cells_of(plan)["full"])
    assert "perations" not in (plan.output / "report.html").read_text(encoding="utf-8")
    assert not (plan.output / "plots" / "loss_over_operations.png").exists()


def test_operations_that_were_not_counted_are_absent_and_not_unreached(make):
    plan = make(is_counted=False)
    growing = write_results(plan)["methods"][1]
    assert (growing["training_flops"], growing["flops_to_loss"]["by_seed"]) == (None, {})
    assert cells_of(plan)["growing"][TO_LOSS] == "n/a"
    assert not (plan.output / "plots" / "loss_over_operations.png").exists()


def test_curves_over_operations_end_where_the_first_seed_does(make):
    results = collect(make())
    for seed, run in results[1].runs.items():
        for row in run.evals:
            row["training_flops"] += seed
    (axes,) = validation_figure(results, "caption", over="training_flops").axes
    ends = [line.get_xdata()[-1] for line in axes.get_lines()]
    assert ends == [100 * NUM_TOKENS, 50 * NUM_TOKENS]
    assert axes.get_xlabel() == "floating-point operations"


def test_seeds_evaluated_at_other_counts_are_compared_at_the_same(make):
    results = collect(make())
    at = ((200, 400, 600, 800, 1000), (400, 800, 1000))
    for (seed, run), counts in zip(list(results[1].runs.items()), at, strict=False):
        rows = [{"training_flops": n, "val_loss": 6 - 3 * n / 1000} for n in counts]
        results[1].runs[seed] = replace(run, evals=rows)
    for seed in list(results[1].runs)[2:]:
        del results[1].runs[seed]
    (axes,) = validation_figure(results[1:], "caption", over="training_flops").axes
    (line,) = axes.get_lines()
    assert line.get_xdata()[-1] == 1000
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices
    on_line = 6 - 3 * heights[:, 0] / 1000
    assert abs(heights[:, 1] - on_line).max() < 1e-12


def test_methods_of_training_are_compared_with_a_plain_run(shared, children, tmp_path):
    chosen = {
        "powers": {"powerprop": {"alpha": 2}},
        "growing batch": {"adadagrad": {"max_batch_size": 8, "statistics": "norms"}},
        "growing depth": {"progressive_depth": STAGES},
        "ahead": {"extrapolation": {"step": 0.1}},
    }
    methods = {label: {"optimizer": "adamw", **each} for label, each in chosen.items()}
    methods = {"plain": {"optimizer": "adamw"}, **methods}
    plan = make_plan(tmp_path / "cmp", {**shared, "methods": methods, "lrs": [1e-2]})
    results = compare(plan)["methods"]
    losses = {each["label"]: each["val_loss"]["by_seed"]["0"] for each in results}
    assert list(losses) == list(methods)
    assert len(set(losses.values())) == len(methods)


def test_a_trained_comparison_counts_the_operations_of_its_runs(shared, children, tmp_path):
    methods = {"full": {"optimizer": "adamw"}}
    methods["growing"] = methods["full"] | {"progressive_depth": STAGES}
    plan = make_plan(tmp_path / "cmp", {**shared, "methods": methods, "lrs": [1e-2]})
    full, growing = compare(plan)["methods"]
    assert 0 < growing["training_flops"] < full["training_flops"]
    for cell, result in zip(plan.all_possible_cells(), (full, growing), strict=True):
        last = read_jsonl(plan.run_dir(cell) / "metrics.jsonl")[-1]
        assert last["training_flops"] == result["training_flops"]
    assert math.isclose(full["flops_to_loss"]["ratio"], 1)
