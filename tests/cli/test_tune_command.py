"""``adarankgrad tune``: a search by real runs, resumed, and bad input."""

import json
import shlex

import pytest
from train_inputs import call, tiny_flags, write_inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_search_recommends_the_best_rate_it_tried_and_reuses_runs(folder, capfd):
    more = {"optimizer": "adarankgrad", "optimizer_args": "refresh_max_gap=2", "max_rank": 4}
    flags = tiny_flags(output="tuning", lr=1e-3, plain_lr=5e-3, steps=3, **more)
    assert call("tune", *flags, "--runs", "2", "--json") == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert set(result["losses"]) == {"0.001", "0.002"}
    assert result["losses"][f"{result['lr']:g}"] == min(result["losses"].values())
    train = result["command"]
    assert f"Train with --output and --steps of your own: {shlex.join(train)}" in captured.err
    run = json.loads(next((folder / "tuning" / "cells").rglob("run.json")).read_text())
    assert train[:2] == ["adarankgrad", "train"]
    assert {"--optimizer-args", "--max-rank", "--seq-len"} <= set(train)
    assert set(train) - {str(result["lr"])} < set(run["command"])
    assert not {"--output", "--steps", "--eval-every", "--tokenizer"} & set(train)
    assert call("tune", "--resume", "--output", "tuning", "--runs", "2", "--json") == 0
    again = capfd.readouterr()
    assert "2 of 2 runs are there already" in again.err
    assert json.loads(again.out.splitlines()[-1])["losses"] == result["losses"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": None}, "--output is missing"),
        ({"optimizer": "adamz"}, "unknown optimizer 'adamz'"),
        ({"runs": 9}, "Invalid value for '--runs'"),
        ({"lr": "fast"}, "--lr 'fast' is not a number"),
        ({"lr": -1}, "must be greater than 0"),
        ({"data": "none.txt"}, "none.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(changes, message, folder, capsys):
    before = sorted(folder.iterdir())
    assert call("tune", *tiny_flags(**{"output": "tuning", **changes})) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(folder.iterdir()) == before
