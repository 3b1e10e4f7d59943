"""Two processes: each is ahead by its own gradient, and both take the same steps."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from adarankgrad.schedules.extrapolation import Extrapolation, ExtrapolationConfig
from workers import run_workers

from .extrapolated_models import OPTIMIZERS, Net, batches, loss_of, net

STEP, NUM_STEPS, NUM_PARTS = 0.3, 3, 2


def data_of(rank):
    return batches(NUM_STEPS, NUM_PARTS, seed=10 + rank)


def run(rank, model, wrapped, **settings):
    """Train a worker's part; returns where its gradients were taken, and the weights."""
    torch.manual_seed(rank)
    optimizer = OPTIMIZERS["sgd"](model)
    config = ExtrapolationConfig(STEP, **settings)
    extrapolation = Extrapolation(optimizer, wrapped, config, num_micro_batches=NUM_PARTS)
    ahead, weights = [], []
    for parts in data_of(rank):
        with extrapolation.extrapolate():
            ahead.append(model.inner.weight.detach().clone())
            for index, part in enumerate(parts):
                keep_apart = index + 1 < NUM_PARTS
                with wrapped.no_sync() if keep_apart else contextlib.nullcontext():
                    (loss_of(wrapped, part) / NUM_PARTS).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(model.inner.weight.detach().clone())
    return {"ahead": ahead, "weights": weights, "state": extrapolation.state_dict()}


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, settings in {
        "local": {"source": "past-local"},
        "global": {"source": "past-global"},
        "noise": {"source": "noise", "scale": "layer"},
    }.items():
        model = plain_net()
        wrapped = DistributedDataParallel(model)
        results[name] = run(rank, model, wrapped, **settings)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def plain_net() -> Net:
    """Without dropout and the layer that has no gradient, which DDP would wait for."""
    model = net().double().eval()
    del model.unused
    return model


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    run_workers(worker, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["local", "global", "noise"])
def test_all_workers_take_the_same_steps_to_the_bit(results, name):
    first, second = (result[name]["weights"] for result in results)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["local", "noise"])
def test_each_worker_is_ahead_by_its_own_direction(results, name):
    first, second = (result[name]["ahead"] for result in results)
    same = [torch.equal(*pair) for pair in zip(first, second, strict=True)]
    assert same == ([True, False, False] if name == "local" else [False] * 3)


def test_the_averaged_gradient_moves_all_workers_alike(results):
    first, second = (result["global"]["ahead"] for result in results)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_workers_give_the_steps_of_one_process_that_plays_both(results):
    model = plain_net()
    optimizer = OPTIMIZERS["sgd"](model)
    params = list(model.parameters())
    past = {0: None, 1: None}
    for step in range(NUM_STEPS):
        total = [torch.zeros_like(param) for param in params]
        for rank in (0, 1):
            real = [param.detach().clone() for param in params]
            if past[rank] is not None:
                with torch.no_grad():
                    torch._foreach_sub_(params, past[rank], alpha=STEP)
            for part in data_of(rank)[step]:
                past[rank] = torch.autograd.grad(loss_of(model, part), params)
                torch._foreach_add_(total, past[rank], alpha=1 / (2 * NUM_PARTS))
            with torch.no_grad():
                torch._foreach_copy_(params, real)
        for param, grad in zip(params, total, strict=True):
            param.grad = grad
        optimizer.step()
        for result in results:
            # The same float64 sums in another order, over three steps.
            torch.testing.assert_close(
                result["local"]["weights"][step], model.inner.weight, rtol=1e-12, atol=1e-14
            )
    for rank, result in enumerate(results):
        torch.testing.assert_close(
            result["local"]["state"]["past"][0], past[rank][0], rtol=1e-11, atol=1e-14
        )
