"""``adarankgrad finetune``: what it prints, and one line for whatever cannot be done."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from adarankgrad.cli import main
from adarankgrad.train.errors import UserError

FILMS = [("a lovely film", 1), ("a dull film", 0)] * 6


def call(*arguments: str) -> int:
    """Call the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main.main(list(arguments))
    return int(end.value.code or 0)


def write_table(path: Path, header: str, rows: list[tuple]) -> str:
    lines = [header, *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def films(folder: Path, rows=FILMS, header="sentence\tlabel", name="films.tsv") -> str:
    return write_table(folder / name, header, rows)


def flags_for(folder: Path, models: Path, **changes) -> list[str]:
    """Flags of a run that would work, on data that are written unless they are named."""
    settings = {
        "task": "classification",
        "model": models / "bert",
        "data": None,
        "output": folder / "run",
        "steps": 2,
        "batch-size": 2,
        "optimizer": "adamw",
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    if settings["data"] is None:
        settings["data"] = films(folder)
    flags = []
    for name, value in settings.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags


@pytest.fixture
def refused(tmp_path, inputs, capsys, monkeypatch):
    """Call the command, see that it refuses in one line before any weight, and return the line."""

    def load_model(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("adarankgrad.finetune.run.load_model", load_model)

    def run(**changes) -> str:
        assert call("finetune", *flags_for(tmp_path, inputs, **changes)) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("adarankgrad: error: ") or "\nadarankgrad: error: " in error
        assert not (tmp_path / "run").exists()
        return error.splitlines()[-1]

    return run


def test_the_command_tunes_and_prints_its_summary(tmp_path, inputs, capsys, monkeypatch):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    flags = flags_for(tmp_path, inputs, steps=None, epochs=1)
    assert call("finetune", *flags, "--json") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    # Ten of twelve examples are left to train on, two of each class at least held back.
    assert summary["steps"] == 5
    assert {"accuracy", "f1", "matthews", "loss"} <= summary["metrics"].keys()
    assert "reading text from 'sentence', label from 'label'" in printed.err
    assert "2 of" in printed.err and "are held back" in printed.err
    assert "new weights: bert.pooler.dense.bias" in printed.err
    assert call("finetune", *flags) == 2  # not empty
    assert call("finetune", *flags, "--overwrite") == 0
    assert call("finetune", "--resume", "--output", str(tmp_path / "run")) == 0


def test_examples_whose_answer_is_cut_off_are_told_and_count_in_no_epoch(
    tmp_path, inputs, capsys, monkeypatch
):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    asked = [{"question": "what is " * n, "answer": "3"} for n in (*[1] * 8, *[80] * 4)]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, asked)))
    named = {"task": "instruction", "model": inputs / "chat", "data": path}
    named |= {"validation": inputs / "dev.jsonl", "generate_examples": 0, "steps": None}
    assert call("finetune", *flags_for(tmp_path, inputs, **named, epochs=1), "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["steps"] == 8 / 2
    assert "12 training examples, 4 cut to 64 tokens, 4 with no answer left\n" in printed.err
    assert "12 validation examples, 0 cut to 64 tokens\n" in printed.err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "classify"}, "unknown task 'classify': did you mean classification"),
        ({"method": "dora"}, "unknown method 'dora'"),
        ({"model": "nowhere"}, "model 'nowhere' is no folder"),
        (
            {"model": "models/minilm"},
            "is no folder: fetch it with adarankgrad fetch-model minilm --output models/minilm.",
        ),
        ({"model": "owner/name"}, "is no folder here, and the hub cannot be asked for it"),
        ({"data": "nothing.csv"}, "data 'nothing.csv' does not exist"),
        ({"validation": "nothing.csv"}, "--validation 'nothing.csv' does not exist"),
        ({"epochs": 1}, "give --steps or --epochs, one of them"),
        ({"steps": None}, "give --steps or --epochs, one of them"),
        ({"max_length": 64}, "max_length = 64 is more than the 32 tokens"),
        ({"metric": "bleu"}, "unknown metric of classification 'bleu'"),
        ({"text_column": "text"}, "no column 'text': name one of sentence, label"),
        ({"label_column": "class"}, "no column 'class': name one of sentence, label"),
        (
            {"task": "instruction"},
            "no column known to hold the prompt: name one of sentence, label with --prompt-column",
        ),
        ({"eval_examples": 1}, "raise --eval-examples, or give other validation data"),
        (
            {"pair_column": "label"},
            "--pair-column is for --task pair-classification or regression: leave it out of",
        ),
        ({"prompt_column": "nope"}, "--prompt-column is for --task instruction: leave it out"),
        ({"messages_column": "nope"}, "--messages-column is for --task instruction"),
        ({"generate_examples": 5}, "--generate-examples is for --task instruction"),
        ({"max_new_tokens": 5}, "--max-new-tokens is for --task instruction"),
        (
            {"task": "masked-lm", "label_column": "label"},
            "--label-column is for --task classification or pair-classification or regression",
        ),
        ({"task": "instruction", "text_column": "sentence"}, "--text-column is for --task class"),
        ({"task": "instruction", "split_characters": True}, "--split-characters is for --task "),
        (
            {"task": "instruction", "prompt_column": "sentence", "messages_column": "label"},
            "--messages-column is of whole chats: leave it out, or --prompt-column",
        ),
        ({"task": "pair-classification"}, "no two columns known to hold a pair"),
        ({"adapter": "rank=8"}, "--adapter is for lora, prilora, sora and sara"),
        ({"method": "lora", "adapter": "r=8"}, "unknown setting of lora 'r'"),
        ({"method": "lora", "adapter": "task_type=CAUSAL_LM"}, "setting of lora 'task_type'"),
        ({"method": "lora", "adapter": "modules_to_save=3"}, "modules_to_save must be a regular"),
        (
            {"method": "lora", "adapter": "rank=0"},
            "--adapter: rank must be an int of at least 1, got 0",
        ),
        (
            {"method": "sora", "adapter": "target_modules='('"},
            "target_modules pattern '(' is no regular expression",
        ),
        (
            {"method": "lora", "adapter": "exclude_modules=query"},
            "exclude_modules 'query' matches no module's whole name",
        ),
        ({"method": "prilora", "adapter": "target_modules=3"}, "target_modules must be"),
        ({"method": "sara", "adapter": "include='('"}, "include pattern '('"),
        ({"method": "sara", "adapter": "restart_optimizer=no"}, "must be True or False, got 'no'"),
        ({"method": "sora", "adapter": "train_gates=no"}, "must be True or False, got 'no'"),
        ({"method": "lora", "adapter": "target_modules=conv"}, "'conv' match no module"),
        ({"method": "prilora", "adapter": "target_modules=conv"}, "'conv' match no module"),
        ({"method": "sora", "adapter": "target_modules=conv"}, "'conv' match no module"),
        ({"method": "sara", "adapter": "include=conv"}, "'conv' matches no trainable parameter"),
        ({"method": "sara", "adapter": "exclude=conv"}, "'conv' matches no trainable parameter"),
        (
            {"method": "lora", "adapter": "rank=4", "optimizer": "adarankgrad"},
            "--method lora has no weight worth projecting, so adarankgrad would be plain AdamW: "
            "give it a rank of at least 8, or --optimizer adamw.",
        ),
        (
            {"method": "lora", "optimizer": "adarankgrad", "max_rank": 64},
            "max_rank = 64 is above the short side of every projected matrix of --method lora, "
            "at most 8",
        ),
        ({"method": "sara", "adapter": "exclude='.'"}, "no trainable parameter is left to select"),
        (
            {"method": "sara", "optimizer_args": "epsilon=1e-6"},
            "unknown argument of adamw 'epsilon': did you mean eps",
        ),
        ({"powerprop": "alpha=2,include=conv"}, "'conv' matches no trainable parameter"),
        ({"powerprop": "alpha=0.5"}, "--powerprop: alpha must be at least 1"),
        (
            {"adadagrad": "max_batch_size=8,eta=0", "gradient_accumulation": 2},
            "--adadagrad: eta must be above 0",
        ),
        ({"extrapolation": "step=-1"}, "--extrapolation: step must be at least 0"),
        (
            {"extrapolation": "step=0.1", "optimizer": "torch.optim.LBFGS", "lr": 1},
            "evaluates the loss several times a step",
        ),
        (
            {"method": "lora", "adadagrad": "max_batch_size=1"},
            "max_batch_size = 1 is below the batch at the start",
        ),
        (
            {"progressive_depth": "layers=(1,2),starts=(0,1)"},
            "has 2: give layers=(2,...), so that none of them is lost",
        ),
        ({"task": "causal-lm", "text_column": "sentence"}, "no end token (eos)"),
        ({"warmup_steps": 9}, "warmup_steps = 9 is more than steps = 2"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes, expected, refused):
    assert expected in refused(**changes)


def test_a_model_that_is_not_there_is_told_before_torch_is_imported(tmp_path, inputs):
    flags = flags_for(tmp_path, inputs, model=inputs / "brt")
    script = (
        "import sys\n"
        "from adarankgrad.cli import main\n"
        "try:\n    main.main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, "finetune", *flags], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "False\n")
    said = f"model '{inputs / 'brt'}' is no folder: did you mean {inputs / 'bert'}?"
    assert ended.stderr == f"adarankgrad: error: {said}\n"


NUMBERS = [("a lovely film", 0.5), ("a dull film", 1.5)] * 6
NAMES = [("a lovely film", "good"), ("a dull film", "bad")] * 6
RARE = [*FILMS, ("the poor film", 2)]


@pytest.mark.parametrize(
    ("task", "rows", "expected"),
    [
        ("classification", NUMBERS, "holds 0.5, a number between classes: use --task regression"),
        ("regression", NAMES, "row 1: column 'label' holds 'good', not a number"),
        (
            "classification",
            [FILMS[0]] * 12,
            "every training example has the label '1': there is nothing to tell apart: check --",
        ),
        ("classification", [*FILMS, ("a film", "")], "row 13: column 'label' has no label"),
        ("classification", [*FILMS, ("", 1)], "row 13: column 'sentence' is empty"),
        ("classification", RARE, "no example of class '2' (1 in training)"),
        ("classification", [("QVQL KLM", 0), ("EVQL", 1)] * 6, "give --split-characters"),
    ],
)
def test_data_that_do_not_fit_the_task_are_refused(task, rows, expected, refused, tmp_path):
    assert expected in refused(task=task, data=films(tmp_path, rows))


@pytest.mark.parametrize(
    ("task", "rows", "count", "expected"),
    [
        ("classification", FILMS, 1, "nothing to tell apart: raise --train-examples, or check"),
        ("regression", NUMBERS, 1, "needs several: raise --train-examples, or check the data"),
        ("classification", [*FILMS, *NAMES], 3, "raise --train-examples, or "),
    ],
)
def test_too_few_examples_of_good_data_are_told_as_such(
    task, rows, count, expected, refused, tmp_path
):
    line = refused(task=task, data=films(tmp_path, rows), train_examples=count)
    assert expected in line


def test_a_validation_of_other_classes_or_columns_is_refused(refused, tmp_path):
    other = films(tmp_path, NAMES, name="other.tsv")
    assert "validation has the label 'good', and training has only 0, 1" in refused(
        validation=other
    )
    half = films(tmp_path, [FILMS[0]], name="half.tsv")
    assert "no example of class '0' (6 in training)" in refused(validation=half)
    named = films(tmp_path, header="sentence\tkind", name="named.tsv")
    assert "named.tsv has no column 'label', which training reads the label from" in refused(
        validation=named
    )


def with_new_token(folder: Path, token: str) -> Path:
    """Return the copy of a model whose tokenizer has a token that the model lacks."""
    copied = shutil.copytree(folder, folder.parent / f"with {token}")
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(copied)
    return copied


# Of a masked language model, any token may stand for a hidden one.
@pytest.mark.parametrize(("task", "token"), [("classification", "film"), ("masked-lm", "whale")])
def test_a_tokenizer_of_tokens_that_the_model_lacks_is_refused(task, token, refused, inputs):
    folder = with_new_token(inputs / "bert", f"{token}s")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    line = refused(model=folder, task=task, data=films(folder, [("a dull films", 0), *FILMS]))
    assert f"makes token {size}, but the model knows {size}: they do not belong" in line


def test_a_token_that_no_text_has_does_no_harm(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    folder = with_new_token(inputs / "bert", "oceans")
    assert call("finetune", *flags_for(tmp_path, inputs, model=folder)) == 0


def test_an_adapter_is_no_model_to_start_from(refused, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "models/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    line = refused(model=folder)
    assert "is an adapter of models/llama, not a model: name the base model" in line


def test_an_adapter_whose_settings_are_damaged_is_none_either(refused, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for content in ("{broken", "[]"):
        (folder / "adapter_config.json").write_text(content)
        assert f"{folder} is an adapter, not a model" in refused(model=folder)


def test_answers_that_the_model_has_no_positions_for_are_refused(refused, inputs):
    asked = {"task": "instruction", "data": inputs / "train.jsonl", "model": inputs / "chat"}
    # The tiny model reads 64 tokens.
    line = refused(**asked, validation=inputs / "dev.jsonl", max_new_tokens=60)
    longest, room = map(int, re.findall(r"prompt of (\d+) .* to (\d+), or give", line)[0])
    assert longest + room == 64
    assert "more than the 64" in line
    line = refused(**asked, validation=inputs / "dev.jsonl", max_new_tokens=room + 1)
    assert f"lower --max-new-tokens to {room}, or give --generate-examples 0" in line


def test_prompts_longer_than_the_model_reads_are_refused(refused, inputs, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [json.dumps({"question": "what is " * 80, "answer": "3"}) for _ in range(12)]
    path.write_text("\n".join(rows))
    asked = {"task": "instruction", "data": path, "model": inputs / "chat"}
    assert "no answer begins within 64 tokens" in refused(**asked)
    line = refused(**asked, generate_examples=1)
    assert "more than the 64" in line and "can read: give --generate-examples 0" in line


def test_a_chat_needs_a_template(refused, inputs, tmp_path):
    path = tmp_path / "chat.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text("\n".join(json.dumps({"messages": talk}) for _ in range(12)))
    settings = {"task": "instruction", "data": path}
    assert "has no chat template" in refused(**settings, model=inputs / "llama")
    path.write_text("\n".join(json.dumps({"messages": talk[:1]}) for _ in range(12)))
    assert "row 1: nobody answers" in refused(**settings, model=inputs / "chat")


def test_a_model_without_the_weights_of_the_task_is_refused(tmp_path, inputs, capsys):
    folder = tmp_path / "headless"
    shutil.copytree(inputs / "bert", folder)
    weights = load_file(folder / "model.safetensors")
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("cls.")}
    save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    assert call("finetune", *flags_for(tmp_path, inputs, task="masked-lm", model=folder)) == 2
    assert "weights of a model for masked-lm, such as cls.predictions" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("method", ["full", "lora", "sara"])
def test_a_model_that_cannot_recompute_is_refused_before_its_weights_are_read(
    method, tmp_path, inputs, capsys, monkeypatch
):
    from transformers import BertForSequenceClassification

    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    monkeypatch.setattr("adarankgrad.finetune.run.load_model", None)
    flags = flags_for(tmp_path, inputs, method=method)
    assert call("finetune", *flags, "--activation-checkpointing") == 2
    assert "cannot compute activations again" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "sara"])
def test_a_method_that_does_not_fit_is_found_before_an_older_run_is_replaced(
    method, tmp_path, inputs, capsys, monkeypatch
):
    def run_methods(*_):
        raise UserError("it does not fit.")

    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    assert call("finetune", *flags_for(tmp_path, inputs, steps=1)) == 0
    before = (tmp_path / "run" / "summary.json").read_text()
    # As in the loop, which runs after the folder is emptied.
    for module in ("train.loop", "finetune.methods.adapted", "finetune.methods.sara"):
        monkeypatch.setattr(f"adarankgrad.{module}.run_methods", run_methods)
    flags = flags_for(tmp_path, inputs, method=method)
    assert call("finetune", *flags, "--overwrite") == 2
    assert "it does not fit." in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").read_text() == before


def test_a_run_of_another_command_is_not_resumed(tmp_path, inputs, capsys):
    assert call("finetune", *flags_for(tmp_path, inputs)) == 0
    assert call("train", "--resume", "--output", str(tmp_path / "run")) == 2
    assert "adarankgrad finetune --resume" in capsys.readouterr().err


def test_a_warning_is_one_line_and_said_once(tmp_path, inputs):
    flags = flags_for(tmp_path, inputs, method="sora", lr=1e-3)
    command = [sys.executable, "-m", "adarankgrad", "finetune", *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    (shown,) = (line for line in run.stderr.splitlines() if "shrinkage" in line)
    assert shown.startswith("adarankgrad: warning: SoRA's shrinkage of 0.337 a step is above the")
    assert "UserWarning" not in run.stderr
