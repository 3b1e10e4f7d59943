"""``adarankgrad demo``: what it prints where, and its exit codes."""

import json
import sys
from pathlib import Path

import pytest

from adarankgrad.cli.main import main
from adarankgrad.train import demo as demo_module
from adarankgrad.train.errors import Interrupted
from adarankgrad.train.stdlib_corpus import StdlibCorpus

sys.path.append(str(Path(__file__).parents[1] / "train"))
from fake_run import write_fake_run  # noqa: E402

SMALL_CORPUS = StdlibCorpus([("a.py", "x = 1\n" * 50)], [("b.py", "y = 2\n" * 50)])


@pytest.fixture
def children(monkeypatch):
    """Replace training by fabricated run folders; returns what each child was given."""
    seen = []

    def train(child):
        seen.append(child)
        command = child._command
        optimizer = command[command.index("--optimizer") + 1]
        write_fake_run(Path(command[command.index("--output") + 1]), optimizer, num_logs=3)
        return 0

    monkeypatch.setattr(demo_module.ChildProcess, "run", train)
    monkeypatch.setattr(demo_module, "read_stdlib", lambda: SMALL_CORPUS)
    return seen


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        main(["demo", *map(str, arguments)])
    return end.value.code or 0


def test_the_demo_prints_the_comparison_and_where_to_look(children, tmp_path, capsys):
    assert run("--output", tmp_path / "demo", "--steps", 12) == 0
    printed = capsys.readouterr().out
    for part in (
        "Validation loss",
        "Mean rank, last log",
        "AdaRankGrad",
        "comparison.html",
        "report.html",
    ):
        assert part in printed
    assert [child._stdout for child in children] == [None, None]
    assert "12" in children[0]._command


def test_with_json_the_object_is_all_of_standard_output(children, tmp_path, capsys):
    assert run("--output", tmp_path / "demo", "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["runs"]["AdaRankGrad"]["projected_state_bytes"] == 860_000
    assert result["elapsed_s"] > 0
    assert Path(result["comparison"]).is_file()
    assert "Validation loss" in captured.err
    assert all(child._stdout is sys.stderr for child in children)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps = 0"),
        (["--seed", "-2"], "seed = -2"),
        (["--stpes", "3"], "--stpes"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, children, tmp_path, capsys):
    assert run("--output", tmp_path / "demo", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [] and children == []


def test_a_folder_with_other_files_is_refused(children, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run("--output", tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--output", tmp_path, "--overwrite") == 0


def test_a_stopped_demo_ends_with_the_code_of_its_signal(children, tmp_path, monkeypatch, capsys):
    def stop(child):
        raise Interrupted("stopped", 130)

    monkeypatch.setattr(demo_module.ChildProcess, "run", stop)
    assert run("--output", tmp_path / "demo") == 130
    assert "adarankgrad demo --output" in capsys.readouterr().err
