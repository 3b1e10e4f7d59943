"""What a task makes of examples, by hand."""

from __future__ import annotations

import math
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from adarankgrad.finetune.config import FinetuneConfig
from adarankgrad.finetune.examples import _hold_back
from adarankgrad.finetune.tasks.chat import tokens_and_labels
from adarankgrad.finetune.tasks.final_number import final_number, is_marked
from adarankgrad.finetune.tasks.find import find_task
from adarankgrad.finetune.tasks.interface import IGNORED, Outcome, pad
from adarankgrad.finetune.tasks.language import score_batch
from adarankgrad.finetune.texts import split_characters


def task_of(name, **changes):
    return find_task(FinetuneConfig(task=name, model="m", data="d", output="o", steps=1, **changes))


def answers_of(model, messages):
    """Text of the tokens that are learnt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens, labels = tokens_and_labels(messages, tokenizer)
    assert [t for t, label in zip(tokens, labels, strict=True) if label not in (IGNORED, t)] == []
    return tokenizer.decode(tokens), tokenizer.decode([i for i in labels if i != IGNORED])


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
]


def test_only_what_the_assistant_says_is_learnt_with_the_token_that_ends_it(inputs):
    whole, learnt = answers_of(inputs / "chat", CHAT)
    end = "<|endoftext|>"
    assert learnt == f"two{end}four{end}"
    assert whole == (
        f"<system>be brief{end}<user>one?{end}<assistant>two{end}<user>three?{end}"
        f"<assistant>four{end}"
    )


def test_without_a_template_a_prompt_and_its_answer_are_two_lines(inputs):
    end = "<|endoftext|>"
    whole, learnt = answers_of(inputs / "llama", [CHAT[1], CHAT[2]])
    assert (whole, learnt) == (f"one?\ntwo{end}", f"two{end}")


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("9+9=18\n#### 18", "18"),
        ("#### 1,234.50", "1234.5"),
        ("costs $-3 #### $-7 in all", "-7"),
        ("first 3, then 12", "12"),
        ("pages 1-3", "3"),
        ("3-5=-2", "-2"),
        ("none", None),
        ("#### none", None),
    ],
)
def test_the_final_number_is_behind_the_mark_or_the_last(answer, number):
    assert final_number(answer) == (None if number is None else Decimal(number))


def test_only_a_marked_answer_counts_as_marked():
    assert is_marked("#### 3") and not is_marked("3") and not is_marked("#### x")


def judged(answers, monkeypatch):
    """What is added to predictions and metrics, given references and what was generated."""
    task = task_of("instruction", generate_examples=len(answers))
    examples = [{"prompt": "?", "completion": reference} for reference in answers]
    monkeypatch.setattr(task, "_generate", lambda *_: list(answers.values()))
    outcome = task.complete(Outcome({}, [{}] * len(answers)), None, examples, None)
    return [line.get("exact_match") for line in outcome.predictions], outcome.metrics


def test_answers_match_by_their_final_number_alone(monkeypatch):
    matches, metrics = judged(
        {"1+1=2\n#### 2": "so it is 2", "#### 4": "#### 5", "7": "no idea", "Paris": "Paris 3"},
        monkeypatch,
    )
    assert matches == [True, False, False, None]
    assert metrics == {"exact_match": 1 / 3, "generated_examples": 4}


def test_references_without_a_number_judge_nothing(monkeypatch):
    matches, metrics = judged({"Paris": "Paris", "Rome": "2"}, monkeypatch)
    assert matches == [None, None]
    assert metrics == {"generated_examples": 2}


def test_a_space_stands_between_letters_and_nowhere_else():
    assert split_characters(" EVQ L\n") == "E V Q L"


def classes(task, labels):
    examples = [{"text": "x", "label": task.label(label, "label", "row")} for label in labels]
    task.prepare(examples, examples)
    return examples


def test_whole_numbers_are_classes_in_their_order_and_names_in_theirs():
    task = task_of("classification")
    classes(task, ["10", 2, "1.0", 2])
    assert task.classes == ["1", "2", "10"]
    classes(task, ["no", "yes", "10", "yes"])
    assert task.classes == ["10", "no", "yes"]
    assert task.model_settings()["id2label"] == {0: "10", 1: "no", 2: "yes"}


def test_accuracy_f1_and_matthews_of_a_small_table():
    task = task_of("classification")
    examples = classes(task, ["0", "0", "0", "1", "1", "1"])
    # Predicted 0 0 1 1 1 0: two true positives, one false, one missed, two true negatives.
    logits = torch.tensor([[2.0, 1], [2, 1], [1, 2], [1, 2], [1, 2], [2, 1]])
    scores = task.score(logits, examples)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["matthews"] == pytest.approx((2 * 2 - 1 * 1) / 9)


def test_matthews_is_zero_where_every_prediction_is_the_same():
    task = task_of("classification")
    examples = classes(task, ["0", "0", "0", "1"])
    assert task.score(torch.tensor([[2.0, 1]]).expand(4, 2), examples)["matthews"] == 0.0


def test_correlations_of_a_small_table():
    task = task_of("regression")
    examples = [{"text": "x", "label": value} for value in (1.0, 2.0, 3.0)]
    scores = task.score(torch.tensor([[1.0], [2.0], [9.0]]), examples)
    # torchmetrics adds 1e-6 to the product of the standard deviations of ranks, here 2/3.
    assert scores["spearman"] == pytest.approx(1.0, abs=2e-6)
    # Deviations -1, 0, 1 and -3, -2, 5: 8 over the root of 2 times 38.
    assert scores["pearson"] == pytest.approx(8 / 76**0.5)
    same = task.score(torch.ones(3, 1), examples)
    assert same == {"spearman": 0.0, "pearson": 0.0}


def test_hidden_tokens_depend_on_seed_and_position_alone(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "residues")
    features = task_of("masked-lm").encode([{"text": "A C D E F G"}] * 8, tokenizer, 32).features

    def hidden(seed):
        data = task_of("masked-lm", seed=seed).training_data(features, 8, tokenizer)
        return [data[position] for position in (5, *range(8))]

    first, again = hidden(0), hidden(0)
    assert first == again and first[0] == first[6] and first != hidden(1)
    for feature in first:
        original = features[0]["input_ids"]
        learnt = [i for i, label in enumerate(feature["labels"]) if label != IGNORED]
        assert learnt and {0, len(original) - 1}.isdisjoint(learnt)
        for place, (token, was) in enumerate(zip(feature["input_ids"], original, strict=True)):
            assert token == was or place in learnt
            assert place not in learnt or feature["labels"][place] == was


def test_the_loss_of_tokens_is_that_of_cross_entropy_by_hand():
    task = task_of("causal-lm")
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]]))
    labels = torch.tensor([[IGNORED, 1, 1]])
    # The first place predicts 1 with 0.5, the second 1 with 0.75; the last predicts nothing.
    loss = -math.log(0.375)
    (score,) = score_batch(*task.aligned(logits, labels))
    assert score.loss == pytest.approx(loss, rel=1e-6)
    assert score[1:] == (2, 1, [0, 1])
    outputs = SimpleNamespace(logits=logits)
    assert task.compute_loss(outputs, labels).item() == pytest.approx(loss / 2, rel=1e-6)
    assert task.compute_loss(outputs, labels, 4).item() == pytest.approx(loss / 4, rel=1e-6)


def test_batches_are_padded_where_they_are_told():
    features = [
        {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]},
        {"input_ids": [7], "attention_mask": [1], "labels": [7]},
    ]
    right, left = pad(features, 9), pad(features, 9, side="left")
    assert right["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert right["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert right["labels"].tolist() == [[5, 6], [7, IGNORED]]
    assert left["input_ids"].tolist() == [[5, 6], [9, 7]]


def test_what_is_held_back_has_some_of_every_class():
    task = task_of("classification")
    examples = [{"text": str(n), "label": "rare" if n % 20 == 0 else "common"} for n in range(60)]
    train, validation = _hold_back(examples, task)
    # A tenth of 57, rounded, and one of three.
    assert [e["label"] for e in validation].count("common") == 6
    assert [e["label"] for e in validation].count("rare") == 1
    assert sorted(map(str, train + validation)) == sorted(map(str, examples))
