"""Comparing optimizers: plans, runs that are reused, and what is left behind."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest
from browser import NEEDS_CHROMIUM, WINDOW_WIDTHS, assert_fits, script_result
from fake_run import write_fake_run

from adarankgrad.compare.cells import flags_of, outcome_of
from adarankgrad.compare.plan import Cell, Method, load_plan, make_plan
from adarankgrad.compare.results import MethodResult, best_cell, collect
from adarankgrad.compare.run import compare
from adarankgrad.train import Interrupted, TrainConfig, TrainingError, UserError, train
from adarankgrad.train.record import load_run


def outputs_of(children):
    return [flags[flags.index("--output") + 1] for flags in children]


def two_methods(shared, output, **changes):
    given = {"optimizers": ["adamw", "adarankgrad"], "lrs": [1e-3, 4e-3], "seeds": [0, 1]}
    return make_plan(output, {**shared, **given, **changes})


def test_rates_are_chosen_on_the_first_seed_and_used_on_the_others(shared, children, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp")
    results = compare(plan)
    # Two methods at two rates on the first seed, and the better rate of each on the second.
    assert len(children) == 2 * 2 + 2
    for method, result in zip(plan.methods, results["methods"], strict=True):
        losses = {entry["lr"]: entry["val_loss"] for entry in result["grid"]}
        assert result["lr"] == min(losses, key=losses.get)
        assert set(result["val_loss"]["by_seed"]) == {"0", "1"}
        assert result["val_loss"]["by_seed"]["0"] == min(losses.values())
        assert best_cell(plan, method).lr == result["lr"]
        assert result["is_at_edge_of_grid"]  # two rates are both ends


def test_methods_of_a_seed_share_weights_data_and_tokenizer(shared, children, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp", seeds=[3], lrs=[1e-9])
    compare(plan)
    flags = [dict(zip(run[::2], run[1::2], strict=True)) for run in children]
    differing = {name for name in flags[0] | flags[1] if flags[0].get(name) != flags[1].get(name)}
    assert differing == {"--optimizer", "--output"}  # adarankgrad is the default
    assert flags[0]["--tokenizer"] == str(plan.tokenizer_dir)
    logged = [[row["loss"] for row in result.first_run.train] for result in collect(plan)]
    # At such a rate nothing is learnt: equal losses mean equal weights and equal batches.
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_what_is_finished_is_not_run_again(shared, children, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp", lrs=[1e-3])
    first = compare(plan)
    assert len(children) == 4
    again = compare(load_plan(plan.output), resume=True)
    assert len(children) == 4
    assert again["methods"] == first["methods"]
    more = two_methods(shared, plan.output, lrs=[1e-3], seeds=[0, 1, 2])
    compare(more, resume=True)
    assert len(children) == 6


def test_a_stopped_comparison_goes_on_where_it_stopped(shared, children, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp", seeds=[0])
    children.exit_codes = {"lr-0.004": (143, "stopped")}
    with pytest.raises(Interrupted, match="compare --resume --output"):
        compare(plan)
    children.exit_codes = {}
    num_before = len(children)
    compare(load_plan(plan.output), resume=True)
    assert len(children) == num_before + 3
    assert not any(
        "lr-0.001" in output and "adamw" in output for output in outputs_of(children)[2:]
    )


def test_a_stopped_run_is_continued_from_its_checkpoint(shared, children, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp", optimizers=["adamw"], lrs=[1e-3], seeds=[0])
    compare(plan)
    run_dir = plan.run_dir(next(plan.all_possible_cells()))
    assert not (run_dir / "checkpoints").exists()  # of a finished run, nobody needs them
    train(plan.config(next(plan.all_possible_cells())), overwrite=True)
    (run_dir / "summary.json").unlink()
    children.exit_codes = {"--resume": (1, "cannot resume")}
    compare(plan, resume=True)
    resumed, afresh = children[-2:]
    assert resumed == ["--resume", "--output", str(run_dir)]
    assert afresh[-1] == "--overwrite"  # what cannot be continued starts again
    assert collect(plan)[0].scores


def test_a_diverged_run_is_reported_and_does_not_stop_the_rest(shared, children, tmp_path):
    children.exit_codes = {"lr-0.004": (3, "the loss became nan at step 3.")}
    plan = two_methods(shared, tmp_path / "cmp", seeds=[0])
    results = compare(plan)
    for result in results["methods"]:
        assert result["lr"] == 1e-3
        bad = next(entry for entry in result["grid"] if entry["lr"] == 4e-3)
        assert (bad["status"], bad["message"]) == ("diverged", "the loss became nan at step 3.")
    num_runs = len(children)
    compare(plan, resume=True)
    assert len(children) == num_runs  # it would diverge again


def test_a_method_that_fails_everywhere_is_shown_as_such(shared, children, tmp_path):
    children.exit_codes = {"--optimizer adamw": (1, "no memory left.")}
    plan = two_methods(shared, tmp_path / "cmp", lrs=[1e-3])
    results = compare(plan)
    failed, fine = results["methods"]
    assert failed["val_loss"]["mean"] is None
    assert failed["grid"][0]["message"] == "no memory left."
    assert fine["val_loss"]["mean"] > 0
    page = (plan.output / "report.html").read_text()
    assert "no memory left." in page
    children.exit_codes = {}
    assert compare(plan, resume=True)["methods"][0]["val_loss"]["mean"] > 0


def test_a_seed_that_is_lost_is_reported_beside_those_that_are_not(shared, children, tmp_path):
    children.exit_codes = {"--seed 1": (-9, "")}
    plan = two_methods(shared, tmp_path / "cmp", lrs=[1e-3])
    result = compare(plan)["methods"][0]
    assert set(result["val_loss"]["by_seed"]) == {"0"}
    assert "killed by signal 9" in result["lost"]["1"]


def test_without_any_result_the_comparison_fails(shared, children, tmp_path):
    children.exit_codes = {"--": (1, "broken")}
    with pytest.raises(TrainingError, match="no run came to its end"):
        compare(two_methods(shared, tmp_path / "cmp"))


def result_of(run):
    return MethodResult(Method("ours", {"optimizer": "adarankgrad"}), [], None, {0: run}, {})


def test_ranks_that_change_are_drawn_and_the_highest_state_is_kept(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run"))
    result = result_of(run)
    assert result.has_changing_ranks
    assert not result_of(replace(run, ranks=run.ranks[:1] * 3)).has_changing_ranks
    plain = run.summary["state_bytes"] - run.summary["projected_state_bytes"]
    run.train[1]["state_bytes"] = plain + 7_000_000
    run.train[2]["state_bytes"] = plain + 6_000_000
    assert result.highest_projected_state_bytes == 7_000_000


def test_the_folder_holds_results_plots_and_a_page(shared, children, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp", lrs=[1e-3])
    results = compare(plan)
    assert json.loads((plan.output / "results.json").read_text()) == results
    names = {path.name for path in (plan.output / "plots").iterdir()}
    # One basis each in so few steps: no rank changes, so none is drawn.
    assert names == {"loss.png", "trade_off.png", "refreshes.png"}
    page = (plan.output / "report.html").read_text()
    for part in ("AdamW", "AdaRankGrad", "Why bases were refreshed", "adarankgrad train --data"):
        assert part in page
    adamw, ours = results["methods"]
    assert adamw["projected_state_bytes"] == adamw["adamw_projected_state_bytes"]
    assert ours["projected_state_bytes"] < adamw["projected_state_bytes"]
    assert ours["highest_projected_state_bytes"] == ours["projected_state_bytes"]
    assert ours["mean_rank_first"] > 0
    assert adamw["mean_rank_first"] is None


def test_the_flags_of_a_run_make_the_same_settings_again(shared, tmp_path):
    from adarankgrad.cli.options import parse_flags

    table = {
        "optimizer": "adarankgrad",
        "optimizer_args": {"carry": "keep", "betas": [0.9, 0.99]},
        "accumulate_in_backward": True,
    }
    plan = make_plan(tmp_path, {**shared, "methods": {"ours": {**table, "energy": 0.9}}})
    config = plan.config(next(plan.all_possible_cells()))
    flags = flags_of(config)
    flags.remove("--accumulate-in-backward")
    texts = {
        name.removeprefix("--").replace("-", "_"): text
        for name, text in zip(flags[::2], flags[1::2], strict=True)
    }
    settings = parse_flags({**texts, "accumulate_in_backward": True}, TrainConfig)
    assert TrainConfig.from_settings(settings) == config


def test_the_page_sorts_and_runs_no_script_but_its_own(shared, children, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp", lrs=[1e-3], seeds=[0])
    compare(plan)
    page = (plan.output / "report.html").read_text()
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert page.count("<script>") == 1
    losses = [result.scores[0] for result in collect(plan)]
    assert all(f'data-value="{loss}"' in page for loss in losses)


@NEEDS_CHROMIUM
def test_a_browser_sorts_the_table_and_shows_the_page_on_phones_and_desktops(
    shared, children, tmp_path
):
    plan = two_methods(shared, tmp_path / "cmp", lrs=[1e-3], seeds=[0])
    compare(plan)
    page = plan.output / "report.html"
    for width in WINDOW_WIDTHS:
        assert_fits(page, width, tmp_path)
    by_state = """
      const table = document.querySelector("table.sortable"), state = table.tHead.rows[0].cells[3];
      state.firstChild.click();
      const first = table.tBodies[0].rows[0].cells[0].textContent;
      state.firstChild.click();
      document.title = first + "," + table.tBodies[0].rows[0].cells[0].textContent;
    """
    assert script_result(page, by_state, tmp_path) == "AdaRankGrad,AdamW"


BAD_PLANS = {
    "no method": ({"optimizers": []}, "--optimizers is missing"),
    "same method twice": ({"optimizers": ["adamw", "adamw"]}, "two methods are called 'AdamW'"),
    "labels with one folder": (
        {"methods": {"a b": {"optimizer": "adamw"}, "A-B": {"optimizer": "adarankgrad"}}},
        "two methods are called 'A-B' and 'a b'",
    ),
    "method without optimizer": ({"methods": {"a": {}}}, "methods.a names no optimizer"),
    "unknown setting": ({"optimizers": ["adamw"], "stepz": 3}, "unknown setting 'stepz'"),
    "unknown setting of a method": (
        {"methods": {"a": {"optimizer": "adamw", "lrz": [1.0]}}},
        "unknown setting of methods.a 'lrz': did you mean lrs\\?",
    ),
    "its own decision": ({"optimizers": ["adamw"], "lr": 0.1}, "list --lrs"),
    "rates that are no list": ({"optimizers": ["adamw"], "lrs": 0.1}, "must be a list"),
    "a rate that is text": ({"optimizers": ["adamw"], "lrs": ["x"]}, "'x' is not a number"),
    "a rate twice": ({"optimizers": ["adamw"], "lrs": [0.1, 0.1]}, "each may stand there once"),
    "no seed": ({"optimizers": ["adamw"], "seeds": []}, "--seeds is empty"),
    "a seed twice": ({"optimizers": ["adamw"], "seeds": [1, 1]}, "each may stand there once"),
    "a bad seed that is not the first": (
        {"optimizers": ["adamw"], "seeds": [0, -1]},
        "AdamW: seed = -1 must not be negative",
    ),
    "a negative rate": ({"optimizers": ["adamw"], "lrs": [-1.0]}, "AdamW: lr = -1.0 must be"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_a_plan_that_makes_no_sense_is_refused(changes, message, shared, tmp_path):
    with pytest.raises(UserError, match=message):
        make_plan(tmp_path / "cmp", {**shared, **changes})


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": {"optimizer": "adamv"}}, "a: unknown optimizer 'adamv'"),
        ({"a": {"optimizer": "no_such.Thing"}}, "a: cannot import no_such"),
        (
            {"a": {"optimizer": "galore", "optimizer_args": {"ranks": 3}}},
            "a: unknown argument of galore 'ranks': did you mean rank",
        ),
        (
            {"a": {"optimizer": "adarankgrad", "optimizer_args": {"memory_budget": "1KiB"}}},
            "a: adarankgrad refuses its arguments: a memory_budget of 1024 bytes does not hold",
        ),
    ],
)
def test_a_method_that_cannot_train_is_refused_before_anything_is_written(
    methods, message, shared, children, tmp_path
):
    with pytest.raises(UserError, match=message):
        compare(make_plan(tmp_path / "cmp", {**shared, "methods": methods}))
    assert not (tmp_path / "cmp").exists()
    assert children == []


def test_the_folder_of_another_comparison_is_refused_and_kept(shared, children, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp", lrs=[1e-3], seeds=[0])
    compare(plan)
    before = (plan.output / "results.json").read_text()
    with pytest.raises(UserError, match="continue it with --resume"):
        compare(plan)
    other = two_methods({**shared, "steps": 24}, plan.output, lrs=[1e-3], seeds=[0])
    with pytest.raises(UserError, match="another comparison, with steps = 12 instead of 24"):
        compare(other, resume=True)
    changed = make_plan(
        plan.output,
        {**shared, "methods": {"AdamW": {"optimizer": "adamw", "optimizer_args": {"eps": 1e-3}}}},
    )
    with pytest.raises(UserError, match="give the new one another label"):
        compare(changed, resume=True)
    assert (plan.output / "results.json").read_text() == before


def test_folders_that_hold_no_comparison_are_refused(shared, children, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds other files"):
        compare(two_methods(shared, tmp_path / "mine"))
    with pytest.raises(UserError, match="holds no comparison to resume"):
        compare(two_methods(shared, tmp_path / "mine"), resume=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_missing_cell_is_called_missing(shared, tmp_path):
    plan = two_methods(shared, tmp_path / "cmp")
    assert outcome_of(plan, Cell(plan.methods[0], 1e-3, None, 0)).status == "missing"
    assert [result.chosen for result in collect(plan)] == [None, None]
