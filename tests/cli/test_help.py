"""``--help``: everything that was written is there, with the defaults."""

import re

import pytest
from train_inputs import call

from adarankgrad.cli.plan import PLANNED
from adarankgrad.memory_plan.request import ALLOWED_OPTIMIZERS


@pytest.fixture
def help_of(monkeypatch, capsys):
    """Return what the help of a command says about each flag."""
    monkeypatch.setenv("COLUMNS", "160")

    def read(command):
        assert call(command, "--help") == 0
        said, flag = {}, ""
        for line in capsys.readouterr().out.splitlines():
            words = line.strip("│ ").split()
            if words and words[0].startswith("--"):
                flag = words[0]
            said[flag] = " ".join([said.get(flag, ""), *words])
        return said

    return read


def default_of(text):
    found = re.search(r"\[default: ([^]]*)\]", text)
    return found and found[1]


@pytest.mark.parametrize(
    ("command", "flag", "default"),
    [
        ("train", "--steps", "1000"),
        ("train", "--weight-decay", "0.0"),
        ("train", "--optimizer", "adarankgrad"),
        ("train", "--lr", None),
        ("finetune", "--max-new-tokens", "256"),
        ("finetune", "--optimizer", None),
        ("compare", "--seeds", "0"),
        ("compare", "--workers", "1"),
        ("tune", "--steps", "200"),
        ("tune", "--eval-every", "the steps"),
        ("plan", "--device", "cuda"),
        ("generate", "--max-new-tokens", "64"),
    ],
)
def test_a_default_is_shown_where_there_is_one(command, flag, default, help_of):
    assert default_of(help_of(command)[flag]) == default


def test_text_in_brackets_is_not_taken_for_markup(help_of):
    assert "a table [methods.NAME] each" in help_of("compare")["--config"]


def test_the_plan_names_the_optimizers_that_it_takes_and_no_others(help_of):
    assert set(PLANNED) == set(ALLOWED_OPTIMIZERS)
    text = help_of("plan")["--optimizer"]
    assert "adagrad-norm" not in text and "torch.optim" not in text
    assert all(name in text for name in PLANNED)
