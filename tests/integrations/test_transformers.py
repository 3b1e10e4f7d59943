"""transformers' Trainer projects gradients in the backward pass by one argument."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from adarankgrad import AdaRankGrad
from adarankgrad.integrations.transformers import AccumulateInBackward
from adarankgrad.optim.projected_grad import ProjectedGrad

# 26 sequences, 2 a batch: 13 batches, of which the last step of an epoch with 4 has one.


class Watch(TrainerCallback):
    """Notes what a step sees, after `AccumulateInBackward`."""

    def __init__(self, accumulate):
        self.accumulate = accumulate
        self.counts, self.num_dense, self.norms = [], [], []

    def on_step_begin(self, args, state, control, **_):
        self.counts.append(self.accumulate.handle.num_micro_batches)

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, **_):
        projected = [p for g in optimizer.param_groups if g["project"] for p in g["params"]]
        self.num_dense.append(sum(not isinstance(p.grad, ProjectedGrad) for p in projected))

    def on_log(self, args, state, control, logs, **_):
        if "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def run(pair, sequences, folder, *, callbacks=(), resume=None, **settings):
    model, optimizer = pair
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2,
            "num_train_epochs": 2,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **settings,
        },
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sequences,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_equal(left, right, *, atol=0.0):
    for (name, expected), param in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(("count", "num_steps"), [(1, 10), (4, 8)])
def test_a_trainer_trains_as_without_hooks(pair, sequences, tmp_path, count, num_steps):
    accumulate = AccumulateInBackward()
    watch = Watch(accumulate)
    settings = {
        "gradient_accumulation_steps": count,
        "max_steps": num_steps,
    }
    expected, result = pair(), pair()
    if count > 1:
        result[0].activation_checkpointing_enable()
    run(expected, sequences, tmp_path, **settings)
    run(result, sequences, tmp_path, callbacks=[accumulate, watch], **settings)
    # Float64 in another order of summation, through 10 steps of Adam at 1e-2, whose directions are
    # at worst a millionfold more sensitive than the gradient where an entry is nearly zero.
    assert_equal(expected[0], result[0], atol=10 * 1e-2 * 1e6 * 2.2e-16 * 20)
    assert set(watch.num_dense) == {0}
    assert min(layer.num_refreshes for layer in result[1].report().layers) >= 2
    assert accumulate.handle is None  # which training's end removes


def test_the_last_step_of_an_epoch_has_fewer_micro_batches(pair, sequences, tmp_path):
    accumulate = AccumulateInBackward()
    watch = Watch(accumulate)
    options = {"residual": "orthogonalized"}
    run(
        pair(**options),
        sequences,
        tmp_path,
        callbacks=[accumulate, watch],
        gradient_accumulation_steps=4,
    )
    assert watch.counts == [4, 4, 4, 1] * 2


def test_the_trainer_clips_at_the_norm_that_it_logs(pair, sequences, tmp_path):
    accumulate = AccumulateInBackward()
    watch = Watch(accumulate)
    exact_pair, estimated_pair = pair(), pair(max_grad_norm=1e9)
    norms = []
    estimated_pair[1].register_step_post_hook(lambda opt, *_: norms.append(opt.last_grad_norm))
    settings = {"max_grad_norm": 0.1, "max_steps": 6}
    exact = run(exact_pair, sequences, tmp_path, **settings)
    callbacks = [accumulate, watch]
    run(estimated_pair, sequences, tmp_path, callbacks=callbacks, **settings)
    # torch divides by the norm plus 1e-6.
    assert norms == pytest.approx([0.1] * 6, rel=1e-4)
    logged = [row["grad_norm"] for row in exact.state.log_history if "grad_norm" in row]
    # Eight probes know the energy outside a basis to 50 % at worst, of twelve matrices together
    # better, and the paths drift apart by the difference.
    assert watch.norms == pytest.approx(logged, rel=0.25)


def test_a_resumed_training_ends_bit_for_bit_the_same(pair, sequences, tmp_path):
    settings = {
        "gradient_accumulation_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_grad_norm": 1.0,
    }
    whole, part = pair(residual="normalized"), pair(residual="normalized")
    run(whole, sequences, tmp_path, callbacks=[AccumulateInBackward()], **settings)
    checkpoint = str(tmp_path / "checkpoint-3")
    accumulate = AccumulateInBackward()
    watch = Watch(accumulate)
    run(part, sequences, tmp_path, callbacks=[accumulate, watch], resume=checkpoint, **settings)
    assert watch.counts == [1, 4, 4, 4, 1]
    assert_equal(whole[0], part[0])


def test_the_optimizer_may_be_built_by_the_trainer(sequences, tmp_path, pair):
    model, _ = pair()
    choice = (AdaRankGrad, {"lr": 1e-3, "basis": "sketched", "residual": "none"})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sequences,
        optimizer_cls_and_kwargs=choice,
        callbacks=[AccumulateInBackward()],
    )
    assert trainer.train().global_step == 2


def test_an_optimizer_of_another_package_is_refused(pair, sequences, tmp_path):
    model, _ = pair()
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"optimizer of adarankgrad, got torch\.optim\.adamw"):
        run((model, other), sequences, tmp_path, callbacks=[AccumulateInBackward()])
