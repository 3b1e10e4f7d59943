"""Two processes train as one process does with both their batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from adarankgrad.adapters import PRILoRAConfig, SaRAConfig, prilora, sara
from workers import run_workers

from .models import causal_loss, tiny_llama, token_batch

CONFIG = PRILoRAConfig(first_rank=2, last_rank=4, prune_every=2)
NUM_STEPS = 3


def train_prilora(rank, num_processes):
    model = prilora.apply(tiny_llama(), CONFIG)
    hook = prilora.step_hook(model, CONFIG, num_steps=NUM_STEPS)
    # Plain descent, since Adam would turn roundings of tiny gradients into whole steps.
    optimizer = torch.optim.SGD(prilora.param_groups(model, CONFIG, lr=1e-1))
    wrapped = DistributedDataParallel(model) if num_processes > 1 else model
    for step in range(1, NUM_STEPS + 1):
        causal_loss(wrapped, token_batch(step)[rank::num_processes]).backward()
        optimizer.step()
        hook.on_optimizer_step(step)
        optimizer.zero_grad()
    a_weights = {
        name: param.detach() for name, param in model.named_parameters() if "lora_A" in name
    }
    return {"A": a_weights, "norms": hook.state_dict()["norms"]}


def train_sara(rank, num_processes):
    config = SaRAConfig(threshold=0.008, rank_loss_weight=0.1, rank_loss_min_side=8)
    model = sara.apply(tiny_llama(), config)
    hook = sara.step_hook(model, config, num_steps=NUM_STEPS)
    optimizer = torch.optim.SGD(sara.param_groups(model, config, lr=1e-1))
    wrapped = DistributedDataParallel(model) if num_processes > 1 else model
    for step in range(1, NUM_STEPS + 1):
        causal_loss(wrapped, token_batch(step)[rank::num_processes]).backward()
        hook.before_optimizer_step(step)
        optimizer.step()
        hook.on_optimizer_step(step)
        optimizer.zero_grad()
    return {name: param.detach() for name, param in sara.merge(model).named_parameters()}


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = {"prilora": train_prilora(rank, 2), "sara": train_sara(rank, 2)}
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes end with."""
    folder = str(tmp_path_factory.mktemp("two_processes"))
    run_workers(worker, folder)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1)]


def test_two_processes_prune_the_same_entries_and_those_of_one_process(results):
    first, second = (result["prilora"] for result in results)
    alone = train_prilora(0, 1)
    for name, weight in first["A"].items():
        assert torch.equal(weight, second["A"][name])
        assert torch.equal(weight == 0, alone["A"][name] == 0)
        # Three steps on means of gradients that were summed in another order.
        torch.testing.assert_close(weight, alone["A"][name], rtol=1e-5, atol=1e-7)
    for name, norm in first["norms"].items():
        assert torch.equal(norm, second["norms"][name])
        torch.testing.assert_close(norm, alone["norms"][name], rtol=1e-5, atol=1e-6)


def test_two_processes_train_the_same_small_weights_as_one_process(results):
    first, second = (result["sara"] for result in results)
    alone = train_sara(0, 1)
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        # As above; the low-rank term's singular vectors magnify roundings of small entries.
        torch.testing.assert_close(weight, alone[name], rtol=1e-3, atol=1e-6)
