"""``adarankgrad compare --task``: fine-tuning runs compared by the metric of their task."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from adarankgrad.cli import main
from adarankgrad.compare.cells import outcome_of
from adarankgrad.compare.grow import grown, plan_to_resume
from adarankgrad.compare.plan import Cell, Plan, load_plan, make_plan
from adarankgrad.compare.results import best_cell
from adarankgrad.compare.tune import settings_to_resume
from adarankgrad.finetune import FinetuneConfig, finetune
from adarankgrad.train import TrainConfig, UserError
from adarankgrad.train.checkpoints import list_checkpoints
from adarankgrad.train.child import ChildPool
from adarankgrad.train.values import read_toml_table

# In 40 steps the fast rate learns the words of films and the slow one learns nothing: of twelve
# films, half of each kind, it then gets all right, or every one of a kind.
SLOW, FAST = 1e-7, 1e-2


def call(*arguments: str) -> int:
    """Call the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main.main(list(arguments))
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def children():
    """Make runs in this process, without their own plots; returns the arguments of each."""
    seen: list[list[str]] = []

    def run_all(pool, jobs, on_end):
        for job in jobs:
            arguments = job.command[job.command.index("adarankgrad") + 1 :]
            seen.append(arguments)
            with job.log.open("w") as log, contextlib.redirect_stderr(log):
                exit_code = call(*arguments)
            on_end(job, exit_code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
        patch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
        patch.setattr(ChildPool, "run", run_all)
        yield seen


def cells_of(plan: Plan, label: str) -> list[Cell]:
    """Return a method's cells on the first seed."""
    return [cell for cell in plan.all_possible_cells() if cell.method.label == label]


def flags_for(inputs: Path, output: Path, **changes) -> list[str]:
    given = {
        "task": "classification",
        "model": inputs / "bert",
        "data": inputs / "train.tsv",
        "validation": inputs / "dev.tsv",
        "output": output,
        "optimizers": "adamw,lora",
        "lrs": f"{SLOW},{FAST}",
        "steps": 40,
        "batch-size": 8,
        "eval-every": 20,
        "save-every": 20,
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    kept = {name: str(value) for name, value in given.items() if value is not None}
    return [text for name, value in kept.items() for text in (f"--{name}", value)]


@pytest.fixture(scope="module")
def finished(inputs, children, tmp_path_factory):
    """Return the folder of a comparison of AdamW and LoRA at two rates on two seeds."""
    output = tmp_path_factory.mktemp("comparison") / "films"
    assert call("compare", *flags_for(inputs, output, seeds="0,1")) == 0
    return output


@pytest.fixture
def copied(finished, tmp_path):
    """Return a copy of the finished comparison, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "films"))


def test_the_better_rate_by_accuracy_wins_and_is_used_on_the_other_seed(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["metric"] == "accuracy"
    assert [method["label"] for method in results["methods"]] == ["AdamW", "LoRA"]
    for method in results["methods"]:
        slow, fast = (entry["metrics"]["accuracy"] for entry in method["grid"])
        assert (slow, fast) == (0.5, 1.0)
        assert method["lr"] == FAST
        assert method["metrics"]["accuracy"]["by_seed"].keys() == {"0", "1"}
        assert method["metrics"]["loss"] == method["val_loss"]
    # Two methods at two rates on the first seed, and the better rate of each on the second.
    assert len(list(finished.glob("cells/*/*/summary.json"))) == 2 * 2 + 2
    full, lora = results["methods"]
    assert (full["plain_lr"], lora["plain_lr"]) == (FAST, None)
    assert lora["doubts"] == {"lr": "at edge", "plain_lr": ""}
    assert lora["trainable_parameters"] < full["trainable_parameters"]
    # Two moments a weight in float32; the count of steps is a number of four bytes a tensor.
    assert full["state_bytes"] >= 8 * full["trainable_parameters"]
    assert not (finished / "tokenizer").exists()


def test_the_page_names_the_metric_and_shows_the_highest_first(finished):
    html = (finished / "report.html").read_text()
    assert "<title>2 ways to fine-tune for classification compared</title>" in html
    assert "Highest validation accuracy: AdamW, 1.0000" in html
    assert 'aria-sort="descending"><button>Validation accuracy' in html
    for name in ("Validation loss", "Trainable", "Optimizer state", "Time", "Accuracy over memory"):
        assert name in html
    assert "Up is better" in html
    plots = {path.name for path in (finished / "plots").iterdir()}
    assert plots == {"metric.png", "loss.png", "trade_off.png", "rates.png"}


def test_what_the_page_says_repeats_the_comparison(finished, tmp_path):
    html = (finished / "report.html").read_text()
    (text,) = re.findall("<pre[^>]*>(model = [^<]*)</pre>", html)
    (tmp_path / "again.toml").write_text(unescape(text))
    plan = load_plan(finished)
    again = make_plan(finished, read_toml_table(tmp_path / "again.toml"))
    assert (again.methods, again.seeds, again.shared) == (plan.methods, plan.seeds, plan.shared)
    commands = re.findall("adarankgrad finetune --task[^<]*", html)
    assert len(commands) == 2
    assert "--method lora" in commands[1]


def test_the_metric_decides_where_the_loss_disagrees(copied):
    plan = load_plan(copied)
    method = plan.methods[0]
    slow, fast = (plan.run_dir(cell) / "summary.json" for cell in cells_of(plan, method.label))
    slow.write_text(json.dumps({"metrics": {"accuracy": 0.7, "loss": 0.5}}))
    fast.write_text(json.dumps({"metrics": {"accuracy": 0.8, "loss": 0.9}}))
    assert best_cell(plan, method).lr == FAST
    plan.shared["metric"] = "loss"
    assert best_cell(plan, method).lr == SLOW
    plan.shared["metric"] = "accuracy"
    fast.write_text(json.dumps({"metrics": {"accuracy": 0.7, "loss": 0.9}}))
    assert best_cell(plan, method).lr == SLOW  # between equals, the loss decides


def test_a_stopped_run_is_continued_a_missing_one_made_and_a_diverged_one_reported(
    copied, children, capsys, monkeypatch
):
    monkeypatch.setattr("adarankgrad.compare.report.draw_plots", lambda plan, results: ({}, {}))
    plan = load_plan(copied)
    stopped, missing = cells_of(plan, "AdamW")[1], cells_of(plan, "LoRA")[0]
    before = {cell.name: outcome_of(plan, cell).metrics for cell in (stopped, missing)}
    finetune(plan.config(stopped), overwrite=True)
    (plan.run_dir(stopped) / "summary.json").unlink()
    shutil.rmtree(list_checkpoints(plan.run_dir(stopped))[-1].path)  # that of the last step
    shutil.rmtree(plan.run_dir(missing))
    children.clear()
    more = ["--optimizers", "adamw", "--lrs", "1e30"]
    assert call("compare", "--resume", "--output", str(copied), *more) == 0
    assert children[0] == ["finetune", "--resume", "--output", str(plan.run_dir(stopped))]
    assert [run[0] for run in children] == ["finetune"] * 3
    assert before == {cell.name: outcome_of(plan, cell).metrics for cell in (stopped, missing)}
    (full, lora) = json.loads((copied / "results.json").read_text())["methods"]
    assert [entry["status"] for entry in full["grid"]] == ["done", "done", "diverged"]
    assert (full["lr"], lora["lr"], len(lora["grid"])) == (FAST, FAST, 2)
    assert "AdamW, lr 1e+30, seed 0: diverged" in capsys.readouterr().err


BAD_INPUT = {
    "task": ({"task": "classify"}, "unknown task 'classify': did you mean classification"),
    "adapter": ({"optimizers": "adamw,lroa"}, "'lroa': did you mean lora"),
    "metric": ({"metric": "bleu"}, "unknown metric of classification 'bleu'"),
    "of train": ({"seq-len": 16}, "seq_len is a setting of train: leave it out"),
    "of finetune": ({"task": None, "metric": "f1"}, "metric is a setting of finetune: name a"),
    "duration": ({"steps": None}, "give --steps or --epochs"),
    "model": ({"model": None}, "--model is missing"),
    "absent data": ({"data": "none.tsv"}, "'none.tsv' does not exist"),
    "above a method": ({"config": "adapter = {rank = 4}"}, "give it to a [methods.NAME]"),
    "of one method": (
        {"config": '[methods.a]\nmethod = "lora"\ntask = "regression"', "optimizers": "a"},
        "task of methods.a is the same for all methods",
    ),
    "nothing": ({"config": "[methods.a]", "optimizers": "a"}, "no optimizer or method"),
    "method": (
        {"config": '[methods.a]\nmethod = "lroa"', "optimizers": "a"},
        "a: unknown method 'lroa'",
    ),
    "rank": (
        {"config": '[methods.a]\nmethod = "lora"\nadapter = {rank = 0}', "optimizers": "a"},
        "a: --adapter: rank must be an int of at least 1",
    ),
    "plain rate of an adapter": (
        {"config": '[methods.a]\nmethod = "lora"\nplain_lrs = [1.0]', "optimizers": "a"},
        "a: --plain-lr is for --method full",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_two(changes, message, inputs, tmp_path, capsys):
    changes = dict(changes)
    if "config" in changes:
        path = tmp_path / "methods.toml"
        path.write_text(changes["config"])
        changes["config"] = path
    assert call("compare", *flags_for(inputs, tmp_path / "films", **changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("adarankgrad: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "films").exists()


def test_a_comparison_grows_by_adapters_and_is_continued_as_what_it_is(copied):
    more = plan_to_resume(copied, {"optimizers": ["sora", "fira"], "plain_lrs": [1e-4]})
    assert [method.label for method in more.methods] == ["AdamW", "LoRA", "SoRA", "Fira"]
    sora, fira = more.methods[2:]
    assert (sora.lrs, sora.plain_lrs, fira.plain_lrs) == ((SLOW, FAST), (), (1e-4,))
    with pytest.raises(UserError, match="with task = 'classification' instead of 'regression'"):
        plan_to_resume(copied, {"task": "regression"})
    pretraining = make_plan(copied, {"data": "text.txt", "optimizers": ["adamw"]})
    with pytest.raises(UserError, match="runs of finetune, not train: name another --output"):
        grown(load_plan(copied), pretraining)
    with pytest.raises(UserError, match="tune searches the rate of pretraining"):
        settings_to_resume(copied)


def test_a_table_has_an_adapter_with_settings_and_an_optimizer(inputs, tmp_path):
    table = {"method": "lora", "adapter": "rank=4,alpha=8", "optimizer": "adarankgrad"}
    settings = {"task": "regression", "data": "a.tsv", "model": "bert", "steps": 3}
    plan = make_plan(tmp_path, {**settings, "methods": {"Ours on LoRA": table}, "lrs": [1e-3]})
    config = plan.config(next(plan.all_possible_cells()))
    assert isinstance(config, FinetuneConfig)
    assert (config.method, config.optimizer) == ("lora", "adarankgrad")
    assert config.adapter == {"rank": 4, "alpha": 8}
    assert plan.metric.title == "Validation Spearman's correlation"


def test_settings_that_both_kinds_of_runs_have_are_read_alike():
    training, tuning = TrainConfig.settings(), FinetuneConfig.settings()
    for name in training.keys() & tuning.keys():
        assert training[name].metadata["kind"] == tuning[name].metadata["kind"]
