"""``adarankgrad compare``: real runs from the command line, what is printed, bad input."""

import json

import pytest
from train_inputs import call, tiny_flags, write_inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(**changes):
    given = {"optimizer": None, "output": "cmp", "optimizers": "adamw", "lrs": "1e-3"}
    return tiny_flags(**given | changes)


def test_two_methods_train_in_processes_of_their_own_and_are_compared(folder, capfd):
    (folder / "methods.toml").write_text(
        '[methods.AdamW]\noptimizer = "adamw"\n'
        '[methods.Adagrad]\noptimizer = "torch.optim.Adagrad"\nlrs = [1e-2]\n'
        "optimizer_args = { eps = 1e-8 }\n"
    )
    more = {"optimizers": None, "config": "methods.toml", "workers": 2, "json": True}
    assert call("compare", *flags(**more)) == 0
    captured = capfd.readouterr()
    results = json.loads(captured.out.splitlines()[-1])
    adamw, adagrad = results["methods"]
    assert [method["label"] for method in results["methods"]] == ["AdamW", "Adagrad"]
    assert (adamw["lr"], adagrad["lr"]) == (1e-3, 1e-2)
    # AdamW holds two moments a weight, Adagrad one.
    assert adamw["projected_state_bytes"] == 2 * adagrad["projected_state_bytes"]
    assert "[2/2]" in captured.err
    assert "50.0 %" in captured.err  # in the table: Adagrad's state, of AdamW's
    assert "--optimizer torch.optim.Adagrad" in (folder / "cmp" / "report.html").read_text()
    again = ["--resume", "--output", "cmp", "--seeds", "0", "--model", "tiny/../tiny/config.json"]
    assert call("compare", *again) == 0
    assert "2 of 2 runs are there already" in capfd.readouterr().err
    assert call("compare", *again, "--steps", "7") == 2
    assert "another comparison, with steps = 6 instead of 7" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "rates": ({"lrs": "1e-3;2e-3"}, "--lrs '1e-3;2e-3' is not a list of numbers"),
        "seeds": ({"seeds": "0,one"}, "--seeds '0,one' is not a list of whole numbers"),
        "an empty name": ({"optimizers": "adamw,"}, "'adamw,' is not a list of names"),
        "a negative seed": ({"seeds": "0,-1"}, "seed = -1 must not be negative"),
        "optimizer": ({"optimizers": "adamw,adamwww"}, "unknown optimizer 'adamwww'"),
        "no output": ({"output": None}, "--output is missing"),
        "no data": ({"data": None}, "--data is missing"),
        "absent data": ({"data": "none.txt"}, "none.txt"),
        "twice": ({"optimizers": "adamw,adamw"}, "two methods are called 'AdamW'"),
        "no plan": ({"optimizers": None}, "--optimizers is missing"),
        "config": ({"config": "none.toml"}, "cannot read the config none.toml"),
        "nothing to resume": ({"resume": True}, "holds no comparison to resume"),
    }.values(),
)
def test_bad_input_is_one_line_and_exit_code_two(changes, message, folder, capsys):
    before = sorted(folder.iterdir())
    assert call("compare", *flags(**changes)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("adarankgrad: error: ")
    assert captured.err.count("\n") == 1
    assert sorted(folder.iterdir()) == before
