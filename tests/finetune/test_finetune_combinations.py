"""What goes together in fine-tuning, as docs/combinations.md says."""

import pytest

from adarankgrad.cli import main
from adarankgrad.train.combinations import REFUSALS
from combination_page import METHODS, OPTIMIZERS, matrix, pairs_with

SAID = matrix("In fine-tuning")
# The tiny BERT has two layers, and a run of three steps 60 tokens or so.
METHODS = METHODS | {
    "--progressive-depth": {"progressive_depth": "layers=(2,3),starts=(0,1),unit=tokens"}
}
OF_MATRICES = ("lora", "prilora", "sora")
ADAPTERS = (*OF_MATRICES, "sara")

# Every allowed pair is in one of these. Methods go together as in training.
RUNS = (
    ("full", "adamw", "--powerprop", "--adadagrad"),
    (
        "full",
        "adarankgrad",
        "--accumulate-in-backward",
        "--extrapolation",
        "--activation-checkpointing",
    ),
    ("full", "adarankgrad-low-memory", "--progressive-depth"),
    ("full", "dotted path", "--powerprop", "--extrapolation", "--activation-checkpointing"),
    ("full", "adagrad-norm", "--adadagrad", "--progressive-depth"),
    ("full", "adarankgrad", "--powerprop", "--adadagrad", "--accumulate-in-backward"),
    ("lora", "adagrad-norm", "--adadagrad", "--activation-checkpointing"),
    *((adapter, "adagrad-norm") for adapter in OF_MATRICES[1:]),
    ("sara", "adagrad-norm", "--extrapolation"),
    *((adapter, "adamw", "--adadagrad") for adapter in ADAPTERS),
    *((adapter, "adarankgrad", "--extrapolation") for adapter in OF_MATRICES),
    *((adapter, "adarankgrad-low-memory") for adapter in OF_MATRICES),
    *((adapter, "dotted path", "--activation-checkpointing") for adapter in ADAPTERS),
)

GROWING = {"adadagrad": "max_batch_size=8", "gradient_accumulation": 2}
# Of adapters that otherwise count the steps of a run.
WITHOUT_STEPS = {"sora": "shrinkage=1e-3", "sara": "reselect_at=None"}
PHASES = "num_phases=1,max_shrinkage=1e-3"
# What the matrix does not say, by the two settings that the page names.
REFUSED = [
    *(
        (
            ("--adadagrad statistics=norms or per-sample", "--method sara"),
            {"method": "sara", **GROWING, "adadagrad": f"max_batch_size=8,statistics={each}"},
        )
        for each in ("norms", "per-sample")
    ),
    (
        ("--method sara without reselect_at=None", "--adadagrad"),
        {"method": "sara", **GROWING},
    ),
    *(
        (
            ("--method sora with num_phases or without shrinkage", "--adadagrad"),
            {"method": "sora", "adapter": f"alpha=8{each}", **GROWING},
        )
        for each in ("", f",shrinkage=1e-4,{PHASES}")
    ),
    (
        ("--method sora with num_phases", "--lr-schedule linear or constant"),
        {"method": "sora", "adapter": PHASES, "lr_schedule": "linear"},
    ),
]


@pytest.fixture
def run(inputs, tmp_path, monkeypatch, capsys):
    """Call the command for a run of three steps without figures; returns exit code and errors."""
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
    settings = {
        "task": "classification",
        "model": inputs / "bert",
        "data": inputs / "train.tsv",
        "validation": inputs / "dev.tsv",
        "output": tmp_path / "run",
        "steps": 3,
        "batch_size": 2,
        "device": "cpu",
    }

    def call_finetune(**changes):
        flags = ["finetune"]
        for name, value in (settings | changes).items():
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        code = 0
        try:
            main.main(flags)
        except SystemExit as end:
            code = end.code or 0
        return code, capsys.readouterr().err.strip()

    return call_finetune


def settings_of(names):
    known = OPTIMIZERS | METHODS
    (method,) = (name for name in names if name not in known)
    settings = {"method": method}
    for name in names:
        settings |= known.get(name, {})
    if "--adadagrad" in names and method in WITHOUT_STEPS:
        settings["adapter"] = WITHOUT_STEPS[method]
    return settings


@pytest.mark.parametrize("names", RUNS, ids=" ".join)
def test_what_goes_together_trains(names, run, tmp_path):
    code, err = run(**settings_of(names))
    assert code == 0, err
    assert any((tmp_path / "run" / "model").glob("*.safetensors"))


def test_every_pair_that_the_page_allows_is_trained_and_no_other():
    trained = {frozenset((method, name)) for method, *names in RUNS for name in names}
    assert trained == pairs_with(SAID, "yes", "in part")


@pytest.mark.parametrize(
    "pair", sorted(pairs_with(SAID, "no"), key=sorted), ids=lambda pair: " ".join(sorted(pair))
)
def test_a_pair_that_the_page_excludes_is_refused_in_one_line(pair, run, tmp_path):
    code, err = run(**settings_of(pair))
    assert code == 2 and len(err.splitlines()) == 1
    assert "does not go together" in err
    assert not (tmp_path / "run").exists()


def test_samples_that_cannot_be_taken_together_end_the_run_with_what_to_do(run):
    growing = {"adadagrad": "max_batch_size=8,statistics=per-sample,chunk_size=2"}
    code, err = run(gradient_accumulation=2, **growing)
    assert code == 1 and err.endswith("at once: use chunk_size=1."), err


@pytest.mark.parametrize(("names", "settings"), REFUSED)
def test_values_that_do_not_go_together_are_refused_in_one_line(names, settings, run, tmp_path):
    code, err = run(**settings)
    (refusal,) = (each for each in REFUSALS if (each.first, each.second) == names)
    assert (code, err) == (2, f"adarankgrad: error: {refusal.message}")
    assert not (tmp_path / "run").exists()
