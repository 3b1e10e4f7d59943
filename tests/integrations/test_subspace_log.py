"""What the optimizer does stands in the Trainer's logs, wherever they go."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from adarankgrad import AdaRankGrad
from adarankgrad.integrations.transformers import AdaRankGradFactory, log_subspaces

from .conftest import CONFIG


class Reporter(TrainerCallback):
    """As an integration of ``report_to``: called in the order of the constructor."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **_):
        self.logs.append(dict(logs))


def trainer_of(sequences, folder, model=None, **choice):
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        logging_steps=1,
        max_grad_norm=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    reporter = Reporter()
    model = model or LlamaForCausalLM(CONFIG)
    if not choice:
        factory = (AdaRankGradFactory, {"training_args": args, "plain_lr": 2e-2, "max_rank": 6})
        choice = {"optimizer_cls_and_kwargs": factory}
    if "optimizer" in choice:
        choice = {"optimizers": (choice["optimizer"](model.parameters()), None)}
    trainer = Trainer(model, args, train_dataset=sequences, callbacks=[reporter], **choice)
    return trainer, reporter


def test_every_training_log_has_rates_ranks_energy_and_bytes(sequences, tmp_path):
    trainer, reporter = trainer_of(sequences, tmp_path)
    log_subspaces(trainer)
    trainer.train()
    *steps, end = reporter.logs
    report = trainer.optimizer.optimizer.report()
    # The linear schedule falls by a third each step.
    assert [row["lr_projected"] for row in steps] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert [row["lr_plain"] for row in steps] == pytest.approx([2e-2, 4e-2 / 3, 2e-2 / 3])
    last = steps[-1]
    assert (last["mean_rank"], last["state_bytes"]) == (report.mean_rank, report.state_bytes)
    assert 0 < last["smallest_rank"] <= last["mean_rank"] <= last["largest_rank"] <= 6
    assert 0 < last["captured_energy"] < 1
    assert last["skipped_steps"] == 0
    assert all(row["grad_norm"] > 1e-2 for row in steps)  # before the Trainer clipped it to 1e-3
    assert "mean_rank" not in end
    assert trainer.state.log_history[-2].items() >= last.items()


def test_groups_of_one_kind_with_other_rates_are_logged_one_by_one(sequences, tmp_path):
    def build(_):
        weights = dict(model.named_parameters())
        layers = [name for name in weights if "_proj" in name]
        plain = [name for name in weights if "_proj" not in name]
        parts = [(layers[:7], 1e-2, True), (layers[7:], 2e-2, True), (plain, 3e-3, False)]
        groups = [
            {"params": [(name, weights[name]) for name in names], "lr": lr, "project": project}
            for names, lr, project in parts
        ]
        return AdaRankGrad(groups, max_rank=6)

    model = LlamaForCausalLM(CONFIG)
    trainer, reporter = trainer_of(sequences, tmp_path, optimizer=build, model=model)
    log_subspaces(trainer)
    trainer.train()
    rates = {name: value for name, value in reporter.logs[0].items() if name.startswith("lr_")}
    assert rates == {"lr_projected_0": 1e-2, "lr_projected_1": 2e-2, "lr_plain": 3e-3}


def test_a_removed_callback_logs_no_more(sequences, tmp_path):
    trainer, reporter = trainer_of(sequences, tmp_path)
    trainer.remove_callback(log_subspaces(trainer))
    trainer.train()
    assert "mean_rank" not in reporter.logs[0]


def test_an_optimizer_of_another_package_is_refused(sequences, tmp_path):
    trainer, _ = trainer_of(sequences, tmp_path, optimizer=torch.optim.AdamW)
    log_subspaces(trainer)
    with pytest.raises(ValueError, match=r"optimizer of adarankgrad, got torch\.optim"):
        trainer.train()
