"""Settings that go together, as docs/combinations.md says, and one line for those that do not."""

from itertools import combinations

import pytest
from train_inputs import call, tiny_flags, write_inputs

from adarankgrad.train.combinations import REFUSALS
from adarankgrad.train.tokenizer import train_tokenizer
from combination_page import flags_of, is_of_adapters, matrix, pairs_with, refused

SAID = matrix("In training")

# Every allowed pair is in one of these; three methods a run, since a run takes most of a second.
RUNS = (
    ("adamw", "--powerprop", "--adadagrad", "--progressive-depth"),
    ("adamw", "--extrapolation", "--activation-checkpointing", "--progressive-depth"),
    ("dotted path", "--powerprop", "--extrapolation", "--activation-checkpointing"),
    ("dotted path", "--adadagrad", "--activation-checkpointing", "--progressive-depth"),
    ("adarankgrad", "--powerprop", "--adadagrad", "--accumulate-in-backward"),
    (
        "adarankgrad",
        "--extrapolation",
        "--accumulate-in-backward",
        "--activation-checkpointing",
        "--progressive-depth",
    ),
    ("adagrad-norm", "--powerprop", "--adadagrad", "--progressive-depth"),
    ("adagrad-norm", "--extrapolation", "--activation-checkpointing"),
    ("adarankgrad-low-memory", "--powerprop", "--extrapolation", "--progressive-depth"),
    (
        "adarankgrad-low-memory",
        "--adadagrad",
        "--accumulate-in-backward",
        "--activation-checkpointing",
    ),
)

REFUSED = {
    ("--adadagrad", "--extrapolation"): {
        "adadagrad": "max_batch_size=8",
        "extrapolation": "step=0.1",
    },
    ("--adadagrad statistics=norms or per-sample", "--accumulate-in-backward"): {
        "adadagrad": "max_batch_size=8,statistics=per-sample",
        "accumulate_in_backward": True,
    },
    ("--adadagrad statistics=norms", "--powerprop"): {
        "adadagrad": "max_batch_size=8,statistics=norms",
        "powerprop": "alpha=2",
    },
    ("--adadagrad statistics=norms", "--progressive-depth"): {
        "adadagrad": "max_batch_size=8,statistics=norms",
        "progressive_depth": "layers=(1,2),starts=(0,32),unit=tokens",
    },
    ("--adadagrad statistics=per-sample", "--activation-checkpointing"): {
        "adadagrad": "max_batch_size=8,statistics=per-sample",
        "activation_checkpointing": True,
    },
    ("--adadagrad statistics=per-sample", "--precision mixed-bfloat16"): {
        "adadagrad": "max_batch_size=8,statistics=per-sample",
        "precision": "mixed-bfloat16",
    },
    ("--progressive-depth unit=steps", "--adadagrad"): {
        "adadagrad": "max_batch_size=8",
        "progressive_depth": "layers=(1,2),starts=(0,2)",
    },
    ("--extrapolation source=past-global", "--accumulate-in-backward"): {
        "extrapolation": "step=0.1,source=past-global",
        "accumulate_in_backward": True,
    },
    ("--powerprop adam_mode=preconditioned", "--accumulate-in-backward"): {
        "powerprop": "alpha=2,adam_mode=preconditioned",
        "accumulate_in_backward": True,
    },
    ("--powerprop adam_mode=preconditioned or decay_on=weight", "--precision bfloat16"): {
        "powerprop": "alpha=2,decay_on=weight",
        "precision": "bfloat16",
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A text, a model of two layers, and a tokenizer that no run has to train."""
    folder = tmp_path_factory.mktemp("combinations")
    write_inputs(folder)
    text = (folder / "text.txt").read_text()
    train_tokenizer([text], 300, 16).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def run(inputs, tmp_path, monkeypatch, capfd):
    """Call the command for a run of three steps without figures; returns exit code and errors."""
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
    monkeypatch.chdir(inputs)

    def call_train(**changes):
        settings = {"output": tmp_path / "run", "tokenizer": "tokenizer", "steps": 3} | changes
        code = call("train", *tiny_flags(**settings))
        return code, capfd.readouterr().err.strip()

    return call_train


@pytest.mark.parametrize("names", RUNS, ids=" ".join)
def test_what_goes_together_trains(names, run, tmp_path):
    code, err = run(**flags_of(names))
    assert code == 0, err
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_every_pair_that_the_page_allows_is_trained_and_no_other():
    trained = {frozenset(pair) for names in RUNS for pair in combinations(names, 2)}
    assert trained == pairs_with(SAID, "yes", "in part")


@pytest.mark.parametrize(
    "pair", sorted(pairs_with(SAID, "no"), key=sorted), ids=lambda pair: " ".join(sorted(pair))
)
def test_a_pair_that_the_page_excludes_is_refused_in_one_line(pair, run, tmp_path):
    code, err = run(**flags_of(tuple(pair)))
    assert code == 2 and len(err.splitlines()) == 1
    assert "go together" in err or "cannot be trained with --accumulate-in-backward" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "refusal", [each for each in REFUSALS if not is_of_adapters(each)], ids=lambda each: each.reason
)
def test_values_that_do_not_go_together_are_refused_in_one_line(refusal, run, tmp_path):
    settings = REFUSED[refusal.first, refusal.second]
    code, err = run(**{"optimizer": "adarankgrad", "gradient_accumulation": 2} | settings)
    assert (code, err) == (2, f"adarankgrad: error: {refusal.message}")
    assert not (tmp_path / "run").exists()


def test_the_page_lists_what_is_refused():
    assert refused() == [[each.first, each.second, each.reason] for each in REFUSALS]
