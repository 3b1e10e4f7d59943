"""What cannot be done is said in one line, with exit code 2, and nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_inputs import call, tiny_flags, write_inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PROGRESS = ("training a tokenizer", "reading the data")


def contents(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def assert_refused(folder, capfd, flags, expected):
    before = contents(folder)
    code = call("train", *flags)
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in lines if line not in PROGRESS]
    assert len(errors) == 1 and errors[0].startswith("adarankgrad: error: "), err
    for part in expected:
        assert part in err
    assert contents(folder) == before


BAD_FLAGS = {
    "no data": ({"data": None}, ["--data is missing"]),
    "no output": ({"output": None}, ["--output is missing"]),
    "missing data": ({"data": "absent.txt"}, ["absent.txt", "does not exist"]),
    "missing folder": ({"data": "no/such/folder/"}, ["no/such/folder", "does not exist"]),
    "empty glob": ({"data": "*.jsonl"}, ["*.jsonl", "does not exist"]),
    "missing validation": (
        {"validation": "absent.txt"},
        ["--validation 'absent.txt' does not exist"],
    ),
    "unknown hub name": ({"data": "nobody/nothing"}, ["nobody/nothing", "hub"]),
    "too little data": ({"batch-size": 4000}, ["64000", "--batch-size"]),
    "too few tokens": ({"batch-size": 700}, ["tokens", "11200", "--batch-size"]),
    "unknown model": ({"model": "smal-llama"}, ["'smal-llama'", "did you mean small-llama"]),
    "model without config": ({"model": "."}, ["has no config.json"]),
    "unknown optimizer": ({"optimizer": "adarank"}, ["'adarank'", "did you mean adarankgrad"]),
    "rank above the matrix": (
        {"optimizer": "adarankgrad", "max-rank": 64},
        ["max_rank = 64", "at most 32"],
    ),
    "floor above ceiling": (
        {"optimizer": "adarankgrad", "max-rank": 4, "min-rank": 8},
        ["min_rank", "max_rank"],
    ),
    "floor above a share": (
        {"optimizer": "adarankgrad", "max-rank": 0.1, "min-rank": 8},
        ["min_rank", "max_rank"],
    ),
    "rank ceiling of a fixed rank": (
        {"optimizer": "galore", "max-rank": 4},
        ["galore has no max_rank", "--optimizer-args rank="],
    ),
    "rank of no columns": ({"max-rank": 0}, ["max_rank = 0", "at least 1"]),
    "share above 1": ({"max-rank": 1.5}, ["max_rank = 1.5", "(0, 1]"]),
    "rank in words": ({"max-rank": "many"}, ["--max-rank 'many'"]),
    "energy of 0": ({"energy": 0}, ["energy = 0", "(0, 1]"]),
    "energy above 1": ({"energy": 1.2}, ["energy = 1.2", "(0, 1]"]),
    "energy not a number": ({"energy": "nan"}, ["energy = nan", "finite"]),
    "no cap of the batch": ({"adadagrad": "eta=0.1"}, ["--adadagrad has no max_batch_size"]),
    "tolerance of 0": (
        {"adadagrad": "max_batch_size=8,eta=0"},
        ["--adadagrad: eta must be above 0", "got 0"],
    ),
    "cap below the start": (
        {"adadagrad": "max_batch_size=3", "gradient-accumulation": 2},
        ["max_batch_size = 3", "2 x 2 samples"],
    ),
    "unknown test": (
        {"adadagrad": "max_batch_size=8,test=sign"},
        ["test must be one of norm, inner-product, augmented", "'sign'"],
    ),
    "unknown setting of adadagrad": (
        {"adadagrad": "max_batch_size=8,theta=0.1"},
        ["unknown setting of --adadagrad 'theta'"],
    ),
    "a test without inner products": (
        {"adadagrad": "max_batch_size=8,test=augmented"},
        ["statistics='per-sample'"],
    ),
    "one micro-batch to compare": (
        {"adadagrad": "max_batch_size=8"},
        ["statistics='micro-batches'", "accumulate at least two"],
    ),
    "lr of 0": ({"lr": 0}, ["lr = 0", "greater than 0"]),
    "lr not a number": ({"lr": "nan"}, ["lr = nan", "finite"]),
    "infinite lr": ({"lr": "inf"}, ["lr = inf", "finite"]),
    "negative lr": ({"lr": -1}, ["lr = -1", "greater than 0"]),
    "lr in words": ({"lr": "fast"}, ["--lr 'fast' is not a number"]),
    "no steps": ({"steps": 0}, ["steps = 0", "greater than 0"]),
    "half a step": ({"steps": 1.5}, ["--steps '1.5' is not a whole number"]),
    "no batch": ({"batch-size": 0}, ["batch_size = 0"]),
    "short sequences": ({"seq-len": 1}, ["seq_len = 1", "at least 2"]),
    "long sequences": ({"seq-len": 128}, ["seq_len = 128", "64 positions"]),
    "long warm-up": ({"warmup-steps": 7}, ["warmup_steps = 7", "steps = 6"]),
    "negative decay": ({"weight-decay": -0.1}, ["weight_decay = -0.1"]),
    "small vocabulary": ({"vocab-size": 100}, ["vocab_size = 100", "257"]),
    "missing tokenizer": ({"tokenizer": "absent"}, ["absent", "tokenizer"]),
    "folder without tokenizer": ({"tokenizer": "tiny"}, ["tiny", "tokenizer"]),
    "unknown precision": ({"precision": "float16"}, ["'float16'", "bfloat16"]),
    "unknown schedule": ({"lr-schedule": "cosin"}, ["did you mean cosine"]),
    "unknown device": ({"device": "gpu"}, ["'gpu'", "cuda:N"]),
    "unknown flag": ({"learning-rate": 1}, ["--learning-rate"]),
    "unknown argument": (
        {"optimizer-args": "beta=0.9"},
        ["'beta'", "did you mean betas", "amsgrad"],
    ),
    "argument with a flag": ({"optimizer-args": "lr=1"}, ["--lr"]),
    "unreadable arguments": ({"optimizer-args": "betas=("}, ["--optimizer-args"]),
    "argument out of range": ({"optimizer-args": "betas=(2.0,0.9)"}, ["adamw", "beta"]),
    "method's argument out of range": (
        {"optimizer": "adarankgrad", "optimizer-args": "carry=nothing"},
        ["carry", "nothing"],
    ),
    "negative extrapolation": (
        {"extrapolation": "step=-0.1"},
        ["--extrapolation: step must be at least 0", "got -0.1"],
    ),
    "extrapolation of no length": (
        {"extrapolation": "source=fresh"},
        ["--extrapolation has no step"],
    ),
    "unknown source": (
        {"extrapolation": "step=0.1,source=past"},
        ["source must be one of past-local, fresh, past-global, noise", "'past'"],
    ),
    "noise without scale": (
        {"extrapolation": "step=0.1,source=noise"},
        ["source='noise' needs a scale"],
    ),
    "unknown setting of extrapolation": (
        {"extrapolation": "stp=0.1"},
        ["unknown setting of --extrapolation 'stp'", "did you mean step"],
    ),
    "extrapolation for closures": (
        {"extrapolation": "step=0.1", "optimizer": "torch.optim.LBFGS"},
        ["torch.optim.LBFGS", "several times a step"],
    ),
    "residual steps ahead of the weights": (
        {
            "optimizer": "adarankgrad",
            "accumulate-in-backward": True,
            "gradient-accumulation": 2,
            "extrapolation": "step=0.1",
        },
        ["residual=orthogonalized", "--gradient-accumulation 1"],
    ),
    "power below 1": ({"powerprop": "alpha=0.5"}, ["--powerprop", "alpha", "at least 1", "0.5"]),
    "no power": ({"powerprop": "adam_mode=theta"}, ["--powerprop has no alpha"]),
    "unknown setting of powers": ({"powerprop": "alfa=2"}, ["'alfa'", "did you mean alpha"]),
    "broken pattern of powers": (
        {"powerprop": "alpha=2,include='('"},
        ["--powerprop", "include pattern '('", "no regular expression"],
    ),
    "number for a pattern": ({"powerprop": "alpha=2,exclude=3"}, ["exclude must be", "got 3"]),
    "number for a layer list": (
        {"progressive_depth": "layers=(1,2),starts=(0,1),layer_list=3"},
        ["--progressive-depth", "layer_list must be", "got 3"],
    ),
    "unreadable powers": ({"powerprop": "2"}, ["--powerprop '2' cannot be read", "alpha=2"]),
    "whole gradients in AdamW": (
        {"accumulate-in-backward": True},
        ["adamw cannot be trained with --accumulate-in-backward", "--optimizer adarankgrad"],
    ),
    "whole gradients elsewhere": (
        {"optimizer": "torch.optim.SGD", "lr": 1, "accumulate-in-backward": True},
        ["torch.optim.SGD cannot be trained with --accumulate-in-backward"],
    ),
    "whole gradients in GaLore": (
        {"optimizer": "galore", "accumulate-in-backward": True},
        ["galore cannot be trained with --accumulate-in-backward", "'exact'"],
    ),
    "whole gradients without a basis": (
        {"optimizer": "orthogonalized-sgd", "accumulate-in-backward": True},
        ["orthogonalized-sgd cannot be trained with --accumulate-in-backward", "'none'"],
    ),
    "whole gradients as published": (
        {"optimizer": "adarankgrad-published", "accumulate-in-backward": True},
        ["basis='sketched', got 'randomized'"],
    ),
    "whole gradients by argument": (
        {
            "optimizer": "adarankgrad",
            "optimizer-args": "basis=exact",
            "accumulate-in-backward": True,
        },
        ["basis='sketched', got 'exact'"],
    ),
    "whole gradients in a residual": (
        {
            "optimizer": "adarankgrad",
            "optimizer-args": "residual=fira",
            "accumulate-in-backward": True,
        },
        ["residual='fira' needs the whole gradient"],
    ),
    "missing config": ({"config": "absent.toml"}, ["absent.toml"]),
    "resume of nothing": ({"resume": True}, ["cannot resume run"]),
    "resume and overwrite": ({"resume": True, "overwrite": True}, ["exclude"]),
    "output below a file": ({"output": "text.txt/run"}, ["text.txt/run", "cannot be written"]),
    "output is a file": ({"output": "text.txt"}, ["is a file"]),
    "unwritable output": ({"output": "/proc/no/run"}, ["/proc/no/run", "cannot be written"]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_request_that_cannot_be_met_is_refused_in_one_line(folder, capfd, name):
    changes, expected = BAD_FLAGS[name]
    assert_refused(folder, capfd, tiny_flags(**changes), expected)


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "binary.txt": (b"\xff\xfe\x00abc" * 9000, "not UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n' * 900, "line 2 is not valid JSON"),
    "other.jsonl": (b'{"body": "a"}\n' * 900, "no column 'text': name one of body"),
    "numbers.jsonl": (b'{"text": 3}\n' * 900, "holds int, not text"),
    "list.json": (b'["a", "b"]' + b" " * 900, "not an object"),
    "broken.parquet": (b"PAR1 no" * 90, "not a valid parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_data_that_cannot_be_read_is_refused_in_one_line(folder, capfd, name):
    content, expected = BAD_FILES[name]
    (folder / name).write_bytes(content)
    assert_refused_quietly = tiny_flags(data=name)
    before = contents(folder)
    assert call("train", *assert_refused_quietly) == 2
    err = capfd.readouterr().err
    assert expected in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert contents(folder) == before


BAD_CONFIGS = {
    "unknown key": ("learning_rate = 0.1\n", ["'learning_rate'", "allowed"]),
    "misspelt key": ('optimiser = "adamw"\n', ["'optimiser'", "did you mean optimizer"]),
    "wrong type": ('steps = "many"\n', ["steps = 'many'", "whole number"]),
    "truth for a number": ("steps = true\n", ["steps = True", "whole number"]),
    "number for a truth": (
        "accumulate_in_backward = 1\n",
        ["accumulate_in_backward = 1", "true or false"],
    ),
    "table for a text": ("[data]\na = 1\n", ["data = {", "text"]),
    "not toml": ("steps = = 3\n", ["not valid TOML"]),
    "not a number": ("lr = nan\n", ["lr = nan", "finite"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_file_with_a_mistake_is_refused_in_one_line(folder, capfd, name):
    content, expected = BAD_CONFIGS[name]
    (folder / "bad.toml").write_text(content)
    flags = tiny_flags(config="bad.toml", steps=None, lr=None, data=None)
    if not content.startswith("[data]"):
        flags += ["--data", "text.txt"]
    before = contents(folder)
    assert call("train", *flags) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert all(part.lower() in err.lower() for part in expected), err
    assert contents(folder) == before


def test_cuda_is_refused_where_it_is_absent(folder, capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(folder, capfd, tiny_flags(device="cuda"), ["cuda", "--device cpu"])


def test_a_folder_that_is_not_empty_is_refused_and_never_overwritten(folder, capfd):
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("years of work")
    assert_refused(folder, capfd, tiny_flags(), ["--resume", "--overwrite"])
    assert_refused(folder, capfd, tiny_flags(overwrite=True), ["no training run"])


def test_overwriting_a_run_that_holds_the_data_is_refused(folder, capfd):
    run = folder / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    (run / "run.json").write_text('{"kind": "adarankgrad run"}')
    (run / "plots").mkdir()
    (folder / "text.txt").rename(run / "plots" / "text.txt")
    for data in ("run/plots/text.txt", "ru*/plots/*.txt", "run"):
        flags = tiny_flags(data=data, overwrite=True)
        assert_refused(folder, capfd, flags, ["lies in the run folder"])


def test_overwriting_a_run_beside_files_of_others_is_refused(folder, capfd):
    run = folder / "run"
    run.mkdir()
    (run / "run.json").write_text('{"kind": "adarankgrad run"}')
    (run / "thesis.txt").write_text("years of work")
    assert_refused(folder, capfd, tiny_flags(overwrite=True), ["no run wrote", "thesis.txt"])


@pytest.mark.parametrize(
    "arguments", ["fused=True,foreach=True", "betas=(0.9,)", "capturable=True"]
)
def test_arguments_that_torchs_adamw_refuses_are_one_line(folder, capfd, arguments):
    flags = tiny_flags(optimizer="adamw", optimizer_args=arguments)
    assert_refused(folder, capfd, flags, ["adamw"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(folder, capfd):
    locked = folder / "locked"
    locked.mkdir(mode=0o500)
    assert_refused(folder, capfd, tiny_flags(output="locked/run"), ["cannot be written"])


@pytest.mark.parametrize("damage", ["truncated", "another kind"])
def test_weights_that_cannot_be_loaded_are_refused(folder, capfd, damage):
    import torch
    from safetensors.torch import save_file

    from adarankgrad.train.tokenizer import train_tokenizer

    train_tokenizer(["a text"], 280, 16).save_pretrained(folder / "tiny")
    weights = folder / "tiny" / "model.safetensors"
    save_file({"encoder.weight": torch.zeros(3)}, weights, metadata={"format": "pt"})
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:20])
    assert_refused(folder, capfd, tiny_flags(model="tiny"), ["tiny", "weights"])


def test_remote_code_of_a_model_is_not_run(folder, capfd):
    config = folder / "tiny" / "config.json"
    config.write_text('{"model_type": "odd", "auto_map": {"AutoConfig": "code.Odd"}}')
    (folder / "tiny" / "code.py").write_text("raise SystemExit('ran remote code')")
    assert_refused(folder, capfd, tiny_flags(), ["config.json"])


def test_help_and_version_do_not_load_torch():
    program = (
        "import sys; from adarankgrad.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    for arguments in (["--version"], ["--help"], ["train", "--help"]):
        result = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
        )
        assert result.stdout.splitlines()[-1] == "False False", arguments
