"""Two processes prune as one process does with both their batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from adarankgrad.adapters import PRILoRAConfig, prilora

from .models import causal_loss, tiny_llama, token_batch

CONFIG = PRILoRAConfig(first_rank=2, last_rank=4, prune_every=2)
NUM_STEPS = 3


def train(rank, num_processes):
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


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(train(rank, 2), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


# Python 3.12 warns of forks beside torch's idle threads; spawning would import for seconds.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_two_processes_hold_the_same_weights_after_an_event_and_those_of_one_process(tmp_path):
    torch.multiprocessing.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    alone = train(0, 1)
    for name, weight in first["A"].items():
        assert torch.equal(weight, second["A"][name])
        assert torch.equal(weight == 0, alone["A"][name] == 0)
        # Three steps on means of gradients that were summed in another order.
        torch.testing.assert_close(weight, alone["A"][name], rtol=1e-5, atol=1e-7)
    for name, norm in first["norms"].items():
        assert torch.equal(norm, second["norms"][name])
        torch.testing.assert_close(norm, alone["norms"][name], rtol=1e-5, atol=1e-6)
