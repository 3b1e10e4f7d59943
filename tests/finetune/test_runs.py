"""A run learns, keeps its best checkpoint, and what it leaves loads without us."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from task_inputs import TASK_INPUTS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adarankgrad.adapters import sara
from adarankgrad.finetune import FinetuneConfig, finetune
from adarankgrad.finetune.examples import load_examples
from adarankgrad.finetune.tasks.classification import Classification
from adarankgrad.finetune.tasks.find import find_task, task_class
from adarankgrad.train import Interrupted, TrainingError, UserError
from adarankgrad.train.checkpoints import list_checkpoints
from adarankgrad.train.display import summary_table
from adarankgrad.train.figure_style import LIGHT
from adarankgrad.train.files import read_jsonl
from adarankgrad.train.flow import Flow
from adarankgrad.train.plots import plot_makers
from adarankgrad.train.record import load_run
from run_folders import rows

ADAPTERS = {
    "lora": {"rank": 4},
    "prilora": {"first_rank": 2, "last_rank": 4, "prune_every": 3},
    "sora": {"rank": 4, "shrinkage": 0.05},
    "sara": {"quantile": 0.2, "rank_loss_weight": 0.1, "rank_loss_min_side": 8},
}


def probability(model, folder, text):
    """Likeliest class and its probability, of one text by itself."""
    batch = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        best = model.eval()(**batch).logits.softmax(-1).max(-1)
    return str(best.indices.item()), best.values.item()


def assert_predicts(model, run, count=3):
    for prediction in read_jsonl(run / "predictions.jsonl")[:count]:
        name, value = probability(model, run / "model", prediction["text"])
        assert name == prediction["prediction"]
        # The written one is of a padded batch in another order: rounding of logits near 1.
        assert value == pytest.approx(prediction["probability"], abs=1e-5)


def test_a_classifier_learns_and_its_plain_model_gives_its_predictions(tune, tmp_path):
    summary = tune(steps=40, eval_every=20, save_every=40)
    assert summary["metrics"]["accuracy"] == 1.0
    written = read_jsonl(tmp_path / "run" / "predictions.jsonl")
    assert [p["prediction"] for p in written] == [p["label"] for p in written]
    assert_predicts(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model"),
        tmp_path / "run",
    )
    assert summary["trainable_parameters"] == 5586  # every weight of the tiny BERT and its head
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved == summary


def test_the_best_model_is_judged_again_only_where_it_is_not_the_last(tune, monkeypatch):
    judged = []
    evaluate = Classification.evaluate

    def count(self, *inputs):
        judged.append(None)
        return evaluate(self, *inputs)

    monkeypatch.setattr(Classification, "evaluate", count)
    assert tune(output="last", steps=4)["best_step"] == 4
    assert len(judged) == 1
    assert tune(output="earlier", steps=12, metric="loss", lr=0.1)["best_step"] < 12
    assert len(judged) == 1 + 4


@pytest.mark.parametrize("method", ["lora", "prilora", "sora"])
def test_an_adapter_loads_with_peft_alone_and_gives_the_predictions(method, tune, inputs, tmp_path):
    tune(method=method, adapter=ADAPTERS[method])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForSequenceClassification.from_pretrained(inputs / "bert", config=config)
    assert_predicts(
        peft.PeftModel.from_pretrained(base, tmp_path / "run" / "model"), tmp_path / "run"
    )


@pytest.mark.parametrize("uses_cache", [True, False])
def test_the_saved_model_says_of_its_cache_what_the_base_says(uses_cache, tune, inputs, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(inputs / "bert", base)
    config = transformers.AutoConfig.from_pretrained(base)
    config.use_cache = uses_cache
    config.save_pretrained(base)
    tune(model=str(base), steps=1)
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert saved.use_cache is uses_cache


def test_sara_leaves_a_whole_model_and_a_delta_of_the_base(tune, inputs, tmp_path):
    tune(method="sara", adapter=ADAPTERS["sara"])
    run = tmp_path / "run"
    merged = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert_predicts(merged, run)
    base = AutoModelForSequenceClassification.from_pretrained(inputs / "bert", num_labels=2)
    tuned = sara.load(base, run / "adapter").state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, tuned[name]), name


def cells_of(summary):
    return [list(column.cells) for column in summary_table(summary).columns]


def test_what_the_gates_of_sora_leave_is_counted_in_the_summary(tune, tmp_path):
    summary = tune(method="sora", adapter={"rank": 4, "shrinkage": 0.1})
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    num_left = sum(weight.numel() for name, weight in saved.items() if ".lora_" in name)
    assert summary["surviving_parameters"] == num_left
    # A and B began with rank 4 in four square layers and two others, each of them twice.
    assert 0 < num_left < 2 * 4 * (4 * (16 + 16) + 2 * (16 + 32))
    (shown,) = (row for row in zip(*cells_of(summary), strict=True) if "left of A" in row[0])
    assert shown == ("  left of A and B", str(num_left))


def test_a_run_whose_gates_all_die_ends_with_one_clear_line(tune, tmp_path):
    with pytest.raises(TrainingError, match="--method sora: every gate of SoRA is zero after step"):
        tune(method="sora", adapter={"rank": 2, "shrinkage": 1.0})
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("pair-classification", {}),
        ("regression", {}),
        ("causal-lm", {}),
        ("instruction", {"max_new_tokens": 4, "generate_examples": 2}),
        ("masked-lm", {"split_characters": True}),
    ],
)
def test_every_task_lowers_its_loss(task, changes, tune, tmp_path):
    summary = tune(task, steps=24, eval_every=2, save_every=24, log_every=24, **changes)
    losses = [row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row]
    assert min(losses) < losses[0]
    assert summary["task"] == task
    written = read_jsonl(tmp_path / "run" / "predictions.jsonl")
    assert len(written) == (12 if task != "causal-lm" else len({p["block"] for p in written}))
    if task in ("causal-lm", "instruction", "masked-lm"):
        # The same float64 sums, once over all tokens and once block by block.
        num_tokens = sum(line["tokens"] for line in written)
        loss = sum(line["loss"] * line["tokens"] for line in written) / num_tokens
        assert summary["val_loss"] == pytest.approx(loss, rel=1e-12)
    if task == "masked-lm":
        found = [
            (h, p)
            for line in written
            for h, p in zip(line["hidden"], line["predicted"], strict=True)
        ]
        assert summary["metrics"]["accuracy"] == sum(h == p for h, p in found) / len(found)
        first = written[0]
        assert first["hidden"] == [first["text"][place - 1] for place in first["places"]]


@pytest.mark.parametrize(
    ("task", "changes"),
    [("instruction", {"generate_examples": 0}), ("masked-lm", {"split_characters": True})],
)
def test_lora_lowers_the_loss_of_a_language_model_and_loads_with_peft_alone(
    task, changes, tune, inputs, tmp_path, monkeypatch
):
    found = task_class(task)
    tokens = torch.tensor([[5, 6, 7, 8]])
    seen = {}

    def logits_of(model):
        with torch.no_grad():
            return model.eval()(input_ids=tokens).logits

    def complete(self, outcome, model, examples, tokenizer, original=found.complete):
        seen["in the run"] = logits_of(model)
        return original(self, outcome, model, examples, tokenizer)

    monkeypatch.setattr(found, "complete", complete)
    tune(task, method="lora", steps=12, eval_every=2, save_every=12, **changes)
    losses = [row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row]
    assert min(losses) < losses[0]
    auto_model = getattr(transformers, found.model_class)
    base = auto_model.from_pretrained(inputs / TASK_INPUTS[task][0])
    before = logits_of(base)
    loaded = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "run" / "model"))
    assert torch.equal(loaded, seen["in the run"]) and not torch.equal(loaded, before)


def test_an_epoch_of_texts_takes_every_block_once(tune, inputs):
    summary = tune("causal-lm", steps=None, epochs=1, batch_size=2, max_length=16)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "llama")
    texts = (inputs / "train.csv").read_text().split()[1:]
    num_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)  # and an end
    num_blocks = math.ceil(num_tokens / 16)
    assert summary["steps"] == math.ceil(num_blocks / 2) != len(texts) / 2


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_new_head_for_numbers_starts_at_the_mean_of_the_training_labels(method, tune, tmp_path):
    tune("regression", method=method, steps=1, lr=1e-12)
    examples = read_jsonl(tmp_path / "run" / "data" / "train.jsonl")
    mean = sum(example["label"] for example in examples) / len(examples)
    weights = load_file(next((tmp_path / "run" / "model").glob("*model.safetensors")))
    (bias,) = (v for name, v in weights.items() if name.endswith("classifier.bias"))
    # One step of Adam is no longer than its rate; the rest is rounding to float32.
    assert bias.item() == pytest.approx(mean, rel=2**-23, abs=1e-11)


def test_as_many_answers_are_generated_and_judged_as_are_asked_for(tune, tmp_path):
    summary = tune("instruction", steps=1, generate_examples=3, max_new_tokens=4)
    predictions = read_jsonl(tmp_path / "run" / "predictions.jsonl")
    assert ["prediction" in line for line in predictions] == [True] * 3 + [False] * 9
    assert summary["metrics"]["generated_examples"] == 3
    assert ["exact_match" in line for line in predictions] == [True] * 3 + [False] * 9
    assert "exact_match" in summary["metrics"]


def test_the_model_is_that_of_the_best_checkpoint_which_is_kept(tune, tmp_path):
    # A rate that breaks what was learnt in the first steps.
    summary = tune(
        lr=0.3,
        lr_schedule="constant",
        metric="loss",
        eval_every=1,
        save_every=4,
        keep_checkpoints=1,
    )
    run = tmp_path / "run"
    losses = {row["step"]: row["val_loss"] for row in rows(run) if "val_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best != 8, "the last step is the best: the test shows nothing"
    assert summary["best_step"] == best
    # The same weights on the same batches.
    assert summary["val_loss"] == losses[best]
    assert {checkpoint.step for checkpoint in list_checkpoints(run)} == {best, 8}
    assert_predicts(AutoModelForSequenceClassification.from_pretrained(run / "model"), run)


CASES = {
    "every weight": {"optimizer": "adarankgrad", "max_rank": 4},
    "batches by length": {"optimizer": "adamw", "group_by_length": True},
    "growing depth": {
        "optimizer": "adarankgrad",
        "progressive_depth": {"layers": [2, 4], "starts": [0, 4]},
    },
    "powers": {"powerprop": {"alpha": 2}},
    "hidden tokens": {"task": "masked-lm", "split_characters": True},
    **{method: {"method": method, "adapter": given} for method, given in ADAPTERS.items()},
    "phases": {"method": "sora", "adapter": {"num_phases": 2, "max_shrinkage": 0.05}},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_killed_run_resumes_to_the_same_result(changes, tune, monkeypatch, tmp_path):
    original = Flow.on_step_end

    def on_step_end(self, args, state, control, **more):
        original(self, args, state, control, **more)
        if state.global_step == 5:
            raise TrainingError("as if killed")

    tune(**changes, output="whole")
    monkeypatch.setattr(Flow, "on_step_end", on_step_end)
    with pytest.raises(TrainingError, match="as if killed"):
        tune(**changes, output="killed")
    monkeypatch.setattr(Flow, "on_step_end", original)
    tune(**changes, output="killed", resume=True)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert rows(whole) == rows(killed)
    is_adapter = (whole / "model" / "adapter_model.safetensors").exists()
    name = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    weights = [(run / "model" / name).read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
    predictions = [run / "predictions.jsonl" for run in (whole, killed)]
    assert predictions[0].read_text() == predictions[1].read_text()


def test_a_run_of_epochs_stopped_before_its_first_checkpoint_starts_again(
    tune, monkeypatch, tmp_path
):
    original = Flow.on_step_begin

    def on_step_begin(self, args, state, control, **more):
        raise TrainingError("as if killed")

    monkeypatch.setattr(Flow, "on_step_begin", on_step_begin)
    with pytest.raises(TrainingError, match="as if killed"):
        tune(steps=None, epochs=0.3)
    monkeypatch.setattr(Flow, "on_step_begin", original)
    # Three tenths of 40 examples, four a step.
    assert tune(steps=None, epochs=0.3, resume=True)["steps"] == 3


def test_an_adapter_does_not_continue_on_another_base(tune, inputs, tmp_path):
    model = tmp_path / "bert"
    shutil.copytree(inputs / "bert", model)
    tune(method="lora", model=str(model))
    weights = load_file(model / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="are not those that its adapter was begun on"):
        tune(method="lora", model=str(model), resume=True)


@pytest.mark.parametrize("precision", ["bfloat16", "mixed-bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_decoder_classifies_in_half_precision(precision, method, tune, inputs, tmp_path):
    summary = tune(
        model=str(inputs / "llama"),
        precision=precision,
        method=method,
        optimizer="adarankgrad",
        steps=2,
    )
    assert 0 < summary["val_loss"] < 2


@pytest.mark.parametrize("task", ["classification", "instruction"])
def test_micro_batches_of_a_step_add_up_to_its_batch(task, tune, tmp_path):
    settings = {"optimizer": "torch.optim.SGD", "steps": 4, "lr": 0.05, "max_grad_norm": 0.0}
    settings |= {"save_every": 4} | ({"generate_examples": 0} if task == "instruction" else {})
    tune(task, **settings, output="one", batch_size=4)
    tune(task, **settings, output="two", batch_size=2, gradient_accumulation=2)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in ("loss", "val_loss", "grad_norm"):
            if name in first:
                # Sums of the same terms in another order; the tiny models have no dropout.
                assert second[name] == pytest.approx(first[name], rel=1e-4)


def info_of(run):
    return json.loads((run / "run.json").read_text())


def test_adarankgrad_trains_the_matrices_of_an_adapter(tune, tmp_path):
    summary = tune(method="lora", adapter={"rank": 8}, optimizer="adarankgrad", max_rank=4, steps=4)
    assert summary["mean_rank"] is not None and summary["mean_rank"] <= 4
    assert "projected weight" in info_of(tmp_path / "run")["describe"]


@pytest.mark.parametrize("method", ADAPTERS)
def test_under_adamw_all_of_an_adapter_but_its_head_counts_as_projected(method, tune, tmp_path):
    given = {**ADAPTERS[method], **({"shrinkage": 0.0} if method == "sora" else {})}
    summary = tune(method=method, adapter=given, steps=1)
    run = tmp_path / "run"
    if method == "sara":
        saved = load_file(run / "adapter" / "sara.safetensors")
        own = [weight for name, weight in saved.items() if name.endswith(".values")]
    else:
        saved = load_file(run / "model" / "adapter_model.safetensors")
        own = [weight for name, weight in saved.items() if ".lora_" in name]
        if method == "sora":  # a gate for each row of A
            own += [weight[:, 0] for name, weight in saved.items() if ".lora_A" in name]
    # Two float32 moments a weight.
    num_bytes = 8 * sum(weight.numel() for weight in own)
    assert summary["projected_state_bytes"] == num_bytes < summary["state_bytes"]
    assert summary["adamw_projected_state_bytes"] == num_bytes
    assert "describe" not in info_of(run)


def test_a_signal_stops_the_run_and_says_how_to_continue(tune, monkeypatch, tmp_path):
    original = Flow.on_step_end

    def on_step_end(self, args, state, control, **more):
        if state.global_step == 3:
            self.stop.received = 15
        original(self, args, state, control, **more)

    monkeypatch.setattr(Flow, "on_step_end", on_step_end)
    command = f"adarankgrad finetune --resume --output {tmp_path / 'run'}"
    with pytest.raises(Interrupted, match=f"after step 3 .*: {command}"):
        tune()


def test_the_rate_of_sora_rises_and_falls_in_every_phase(tune, tmp_path):
    phases = {"num_phases": 2, "max_shrinkage": 1e-3, "warmup_share": 0.25}
    tune(method="sora", adapter=phases, steps=16, log_every=1, save_every=16)
    rates = [row["lr"] / 1e-2 for row in rows(tmp_path / "run") if "loss" in row]
    # Of 8, 4 and 4 steps, a quarter of each a warm-up.
    first, other = [1 / 3, 2 / 3, *(k / 6 for k in range(6, 0, -1))], [1 / 2, 1, 2 / 3, 1 / 3]
    assert rates == pytest.approx([*first, *other, *other])


def test_the_metrics_of_a_task_are_drawn_over_steps_the_chosen_one_first(tune, tmp_path):
    tune(metric="f1", eval_every=2)
    run = load_run(tmp_path / "run")
    assert run.task_metrics == ["f1", "accuracy", "matthews"]
    (axes,) = plot_makers(run)["metric"](LIGHT).axes
    first, *_, best = axes.get_lines()
    assert list(first.get_xdata()) == [2, 4, 6, 8]
    assert list(first.get_ydata()) == [row["f1"] for row in run.evals]
    assert list(best.get_xdata()) == [run.summary["best_step"]] * 2


def test_a_task_without_another_metric_than_the_loss_has_no_such_figure(tune, tmp_path):
    tune("causal-lm", steps=2, eval_every=2)
    assert "metric" not in plot_makers(load_run(tmp_path / "run"))


def test_numbers_that_may_be_classes_are_told_and_learnt(tune, settings, inputs):
    def notes(**changes):
        config = FinetuneConfig.from_settings(settings("regression", **changes))
        return load_examples(config, find_task(config)).notes

    said = "warning: column 'label' holds only the whole numbers 0, 1: if they are classes, use"
    films = {"data": str(inputs / "train.tsv"), "validation": str(inputs / "dev.tsv")}
    pairs = {name: path.replace(".tsv", "_pairs.tsv") for name, path in films.items()}
    assert f"{said} --task classification" in notes(**films)
    assert f"{said} --task pair-classification" in notes(**pairs)
    assert not any("classes" in note for note in notes())
    assert tune("regression", steps=1, **films)["metrics"]["loss"] > 0


def test_chats_that_ask_the_same_are_told_whatever_is_answered(settings, tmp_path, inputs):
    for name, answer in (("train", "a"), ("dev", "b")):
        turns = [("user", "one?"), ("assistant", answer), ("user", f"{name}?"), ("assistant", "c")]
        chats = [
            {"messages": [{"role": role, "content": content} for role, content in turns[:length]]}
            for length in (2, 4)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, chats)))
    data = {"data": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "dev.jsonl")}
    config = FinetuneConfig.from_settings(settings("instruction", **data))
    notes = load_examples(config, find_task(config)).notes
    assert "warning: 1 of 2 validation inputs are in training too" in notes


def test_a_finished_run_has_a_report_with_its_evaluations(settings, tmp_path):
    finetune(FinetuneConfig.from_settings(settings()))
    page = Path(tmp_path / "run" / "report.html").read_text()
    for part in ("fine-tuned for classification with AdamW", "Evaluations", "Metrics over steps"):
        assert part in page
    assert "<th>Step</th>" in page and "training flops" not in page
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {
        "loss.png",
        "memory.png",
        "metric.png",
    }
