"""``adarankgrad plan``: one table, one JSON object, and bad input in one line."""

import json

import pytest
from train_inputs import call, write_inputs

from adarankgrad.train.config import TrainConfig

LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(capfd, *flags):
    assert call("plan", *flags, "--json") == 0
    captured = capfd.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_every_method_is_predicted_with_and_without_its_switches(folder, capfd):
    result, table = plan(capfd, "--model", "tiny/config.json", "--batch", "2", "--seq", "16")
    rows = {(row["method"], *row["switches"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 20
    assert {name for name, *_ in rows} == {
        "AdamW",
        "8-bit AdamW",
        "LoRA r=16",
        "galore",
        "adarankgrad",
        "adarankgrad-low-memory",
    }
    assert rows["AdamW",]["state_bytes"] == 8 * result["num_weights"]
    assert rows["adarankgrad", "int8_state"]["state_bytes"] < rows["adarankgrad",]["state_bytes"]
    assert max(result["savings_bytes"].values()) > 0
    assert "AdamW" in table
    assert "saves most by itself" in table


def test_a_residual_that_needs_whole_gradients_is_not_planned_without_them(folder, capfd):
    flags = ("--model", "tiny/config.json", "--batch", "2", "--seq", "16")
    result, _ = plan(capfd, *flags, "--optimizer-args", "residual=fira")
    switches = [row["switches"] for row in result["rows"] if row["method"] == "adarankgrad"]
    assert not any("accumulate_in_backward" in row for row in switches)
    assert any("int8_state" in row for row in switches)
    for arguments in ("residual=fira", "basis=randomized"):
        asked = ("--optimizer", "adarankgrad-low-memory", "--optimizer-args", arguments)
        result, _ = plan(capfd, *flags, *asked)
        rows = [row for row in result["rows"] if row["method"] == "adarankgrad-low-memory"]
        assert rows and not any("accumulate_in_backward" in row["switches"] for row in rows)


def test_it_says_what_fits_and_which_batch_would(folder, capfd):
    flags = ("--model", "tiny/config.json", "--seq", "16", "--gpu", "2MiB")
    result, table = plan(capfd, *flags, "--batch", "1")
    assert result["gpu_bytes"] == 2 * 2**20
    for row in result["rows"]:
        assert row["fits"] == (row["peak_bytes"] <= 2 * 2**20) == (row["largest_batch"] >= 1)
    row = next(row for row in result["rows"] if row["largest_batch"] > 1)
    assert "of 20 fit 2.00 MiB." in table

    result, _ = plan(capfd, *flags, "--batch", str(row["largest_batch"] + 1))
    same = {"method": row["method"], "switches": row["switches"]}
    beyond = next(row for row in result["rows"] if same.items() <= row.items())
    assert not beyond["fits"]


def test_arguments_of_the_optimizer_are_those_of_training(folder, capfd):
    flags = ("--model", "tiny/config.json", "--seq", "16")
    free, _ = plan(capfd, *flags)
    held, table = plan(capfd, *flags, "--optimizer-args", "memory_budget='32KiB'")
    ours = [row for row in held["rows"] if row["method"] == "adarankgrad"]
    assert ours[0]["state_bytes"] < free["rows"][-8]["state_bytes"]
    assert held["rank"] == "memory_budget"
    assert "Ranks are taken at their memory budget." in table


def test_a_model_of_eight_billion_weights_is_predicted_without_them(tmp_path):
    from adarankgrad.memory_plan.costs import adamw_costs
    from adarankgrad.memory_plan.methods import trace_model
    from adarankgrad.memory_plan.predict import Training

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    model = str(tmp_path / "config.json")
    config = TrainConfig(data="-", output="-", model=model, seq_len=2048, precision="bfloat16")
    traced = trace_model(config)
    # 2·128256·4096 + 32·(2·4096² + 2·4096·1024 + 3·4096·14336 + 2·4096) + 4096.
    num_weights = 8_030_261_248
    # Beside the weights only the 64 frequencies of the rotary embedding, twice.
    assert traced.weight_bytes == 2 * num_weights + 2 * 64 * 2
    adamw = Training(traced.weight_bytes, traced.traces[0], adamw_costs(traced.model, "cpu"))
    predicted = adamw.predict(1)
    assert predicted.state == 4 * num_weights
    assert predicted.gradients == 2 * num_weights
    # The residual stream of 32 checkpoints and the logits thrice are less than all activations.
    checkpointed = traced.traces[1].live(1).max()
    assert 32 * 2048 * 4096 * 2 < checkpointed < predicted.activations


def test_seven_billion_weights_are_planned_by_the_command(capfd):
    """About eight seconds of a CPU: two passes of the model, and two with adapters."""
    flags = ("--model", "7b", "--batch", "1", "--seq", "2048", "--precision", "bfloat16")
    result, _ = plan(capfd, *flags, "--gpu", "80GiB")
    # 2·32000·4096 + 32·(4·4096² + 3·4096·11008 + 2·4096) + 4096.
    num_weights = 6_738_415_616
    assert result["num_weights"] == num_weights
    rows = {(row["method"], *row["switches"]): row for row in result["rows"]}
    plain, checkpointed = rows["AdamW",], rows["AdamW", "activation_checkpointing"]
    assert plain["state_bytes"] == 2 * plain["gradients_bytes"] == 4 * num_weights
    # Beside the weights only the 64 frequencies of the rotary embedding, twice.
    assert plain["weights_bytes"] == 2 * num_weights + 2 * 64 * 2
    # The residual stream at 32 checkpoints.
    least = 32 * 2048 * 4096 * 2
    assert least < checkpointed["activations_bytes"] < plain["activations_bytes"]
    assert checkpointed["fits"]
    assert rows["adarankgrad", "int8_state"]["state_bytes"] < rows["adarankgrad",]["state_bytes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "9b"), "unknown model '9b'"),
        (("--batch", "0"), "batch_size = 0 must be greater than 0"),
        (("--seq", "1"), "seq_len = 1 must be at least 2"),
        (("--seq", "65", "--model", "tiny/config.json"), "more than the 64 positions"),
        (("--gpu", "24"), "--gpu '24' is not a size"),
        (("--gpu", "lots"), "--gpu 'lots' is not a size"),
        (("--optimizer", "adamz"), "unknown optimizer to plan for 'adamz'"),
        (("--optimizer", "torch.optim.Muon"), "unknown optimizer to plan for"),
        (("--optimizer-args", "colour=1"), "unknown argument of adarankgrad 'colour'"),
        (("--optimizer", "lora", "--optimizer-args", "rank=4"), "lora takes no --optimizer-args"),
        (("--precision", "int4"), "unknown precision 'int4'"),
        (("--device", "abacus"), "unknown device 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(flags, message, folder, capsys):
    assert call("plan", *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9)])
def test_sizes_are_binary_or_decimal(text, size):
    from adarankgrad.memory_plan.request import parse_size

    assert parse_size(text) == size
