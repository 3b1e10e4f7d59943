"""transformers' own `Trainer`, killed by SIGKILL, goes on from its newest sealed checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import killed
from adarankgrad.integrations.transformers import (
    AccumulateInBackward,
    SealCheckpoints,
    newest_sealed,
)
from same_values import assert_same_values
from state_forms import STATE_FORMS

NUM_KILLS = 5  # in each form of state, of nine steps with the start
STEPS = 8


def train(output_dir, config_path, form, events):
    """Fine-tune as a user's script does."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    from adarankgrad import AdaRankGrad, param_groups

    events.follow_trainer(output_dir)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_path))
    model.to(form.dtype)
    options = {"refresh_max_gap": 3, **form.options}
    blocks = torch.randint(0, 300, (64, 16), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(output_dir),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2 if form.accumulates_in_backward else 1,
            save_steps=2,
            save_total_limit=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        optimizers=(AdaRankGrad(param_groups(model, max_rank=8), **options), None),
        callbacks=[SealCheckpoints()],
    )
    if form.accumulates_in_backward:
        trainer.add_callback(AccumulateInBackward())
    trainer.train(resume_from_checkpoint=newest_sealed(output_dir))


def result(output_dir):
    """Weights, optimizer and losses of the last checkpoint."""
    folder = output_dir / f"checkpoint-{STEPS}"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": load_file(folder / "model.safetensors"),
        "optimizer": torch.load(folder / "optimizer.pt", weights_only=True),
        "losses": [(row["step"], row["loss"]) for row in history if "loss" in row],
    }


@pytest.mark.parametrize("name", STATE_FORMS)
def test_a_trainer_killed_again_and_again_ends_like_one_left_alone(name, inputs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = inputs / "tiny" / "config.json", STATE_FORMS[name]
    killed.kill_again_and_again(train, whole, parts, *arguments, num_kills=NUM_KILLS, seed=name)
    assert_same_values(result(whole), result(parts))


def write_checkpoint(output_dir: Path, step: int, *, is_sealed: bool = True) -> Path:
    from adarankgrad.train.files import seal_folder

    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_text("state")
    if is_sealed:
        seal_folder(folder)
    return folder


def test_without_a_complete_checkpoint_training_starts_from_the_beginning(tmp_path):
    assert newest_sealed(tmp_path / "missing") is None
    write_checkpoint(tmp_path, 2, is_sealed=False)
    with pytest.warns(UserWarning, match="checkpoint-2: manifest.json is missing"):
        assert newest_sealed(tmp_path) is None


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    older = write_checkpoint(tmp_path, 2)
    (write_checkpoint(tmp_path, 10) / "optimizer.pt").write_text("other")
    with pytest.warns(UserWarning, match="checkpoint-10: the checksum of optimizer.pt"):
        assert newest_sealed(tmp_path) == str(older)


def test_checkpoints_that_are_all_damaged_are_never_trained_over(tmp_path):
    for step in (2, 4):
        write_checkpoint(tmp_path, step, is_sealed=False)
    with pytest.raises(ValueError, match=r"checkpoint-4: manifest.json is missing; .*checkpoint-2"):
        newest_sealed(tmp_path)


def test_keeping_a_single_checkpoint_is_refused(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), save_total_limit=1, use_cpu=True)
    with pytest.raises(ValueError, match="keep at least 2"):
        SealCheckpoints().on_train_begin(args, TrainerState(), TrainerControl())
