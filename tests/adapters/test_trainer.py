"""Adapters in transformers' `Trainer`, through one callback."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from adarankgrad.adapters import (
    AdapterCallback,
    PRILoRAConfig,
    SaRAConfig,
    SoRAConfig,
    find_adapter,
)

from .models import tiny_llama, token_batch
from .training import assert_same_state

CASES = {
    "prilora": PRILoRAConfig(first_rank=2, last_rank=4, prune_every=2),
    "sora": SoRAConfig(rank=4, shrinkage=0.1),
    "sara": SaRAConfig(rank_loss_weight=0.1, rank_loss_min_side=8),
}


class Tokens(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        tokens = token_batch(index, batch=1)[0]
        return {"input_ids": tokens, "labels": tokens}


def trainer(method, folder, num_steps=4, tie=False):
    adapter, config = find_adapter(method), CASES[method]
    model = adapter.apply(tiny_llama(tie=tie), config)
    optimizer = torch.optim.AdamW(adapter.param_groups(model, config, lr=1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    hook = adapter.step_hook(model, config, num_steps=4)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        save_strategy="steps",
        save_steps=2,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Tokens(),
        optimizers=(optimizer, schedule),
        callbacks=[AdapterCallback(hook)],
    )


@pytest.mark.filterwarnings("ignore:this folder holds SoRA's gates:UserWarning")
@pytest.mark.parametrize(
    ("method", "tie"), [("prilora", False), ("sora", False), ("sara", False), ("sara", True)]
)
def test_a_run_resumed_by_the_trainer_continues_bit_for_bit(method, tie, tmp_path):
    whole = trainer(method, tmp_path, tie=tie)
    whole.train()
    resumed = trainer(method, tmp_path, tie=tie)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(whole.model, resumed.model)
    assert resumed.state.global_step == 4


def test_a_resume_without_the_hooks_state_is_refused(tmp_path):
    trainer("prilora", tmp_path, num_steps=2).train()
    (tmp_path / "checkpoint-2" / "adapter_steps.pt").unlink()
    with pytest.raises(ValueError, match=r"resumes at step 2, but .*adapter_steps.pt does not"):
        trainer("prilora", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
