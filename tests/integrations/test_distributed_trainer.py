"""Two processes under Trainer (DDP, gloo) train as one process does with both their batches."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from adarankgrad.integrations.transformers import AdaRankGradFactory
from workers import run_workers

from .conftest import CONFIG

NUM_STEPS = 4
WITHOUT_DROPOUT = LlamaConfig(**{**CONFIG.to_dict(), "attention_dropout": 0.0})
# Of Adam's second moment the root is taken: a large eps keeps the directions of entries that are
# nearly zero from magnifying the roundings of their sums.
OPTIONS = {"max_rank": 6, "refresh_max_gap": 2, "eps": 1e-3, "plain_lr": 1e-3}


def train(sequences, folder, *, batch_size, resume=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(WITHOUT_DROPOUT).double()
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        max_steps=NUM_STEPS,
        learning_rate=1e-3,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    choice = (AdaRankGradFactory, {"training_args": args, **OPTIONS})
    trainer = Trainer(model, args, train_dataset=sequences, optimizer_cls_and_kwargs=choice)
    trainer.train(resume_from_checkpoint=resume)
    optimizer = trainer.optimizer.optimizer
    return {
        "weights": model.state_dict(),
        "bases": {
            name: optimizer.state[param]["basis"]
            for name, param in model.named_parameters()
            if "basis" in optimizer.state[param]
        },
    }


def worker(rank, port, sequences, folder):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",  # accelerate warns where it has to choose
    )
    whole = train(sequences, folder, batch_size=2)
    resumed = train(sequences, folder, batch_size=2, resume=f"{folder}/checkpoint-2")
    torch.save({"whole": whole, "resumed": resumed}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def results(sequences, tmp_path_factory):
    """What two processes end with."""
    folder = str(tmp_path_factory.mktemp("two_processes"))
    run_workers(worker, free_port(), sequences, folder)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1)]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("part", ["weights", "bases"])
def test_both_processes_end_with_the_same(results, part):
    assert_same(results[0]["whole"][part], results[1]["whole"][part])


def test_one_process_with_the_same_batches_ends_with_the_same(results, sequences, tmp_path):
    alone = train(sequences, str(tmp_path), batch_size=4)
    together = results[0]["whole"]
    for name, weight in alone["weights"].items():
        # Gradients of 1e-2 summed in another order differ by 1e-18 or so, which Adam divides by
        # eps, and Newton-Schulz magnifies by the spread of singular values, at most 1e4 here; then
        # four steps of 1e-3. Below that stands the rounding of the weights, 1e-16.
        torch.testing.assert_close(together["weights"][name], weight, rtol=0, atol=1e-13)
    assert {name: basis.shape for name, basis in alone["bases"].items()} == {
        name: basis.shape for name, basis in together["bases"].items()
    }


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("part", ["weights", "bases"])
def test_resumed_processes_end_bit_for_bit_the_same(results, rank, part):
    assert_same(results[rank]["whole"][part], results[rank]["resumed"][part])
