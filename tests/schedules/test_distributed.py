"""Two processes measure the noise that one process does with both their micro-batches."""

from __future__ import annotations

import contextlib
import gc
import json

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from adarankgrad.schedules.adadagrad import MicroBatchNorms, SampleNorms
from workers import run_workers

from .models import NUM_SAMPLES, Sequences, loss_sum, num_targets, tokens


def measure(rank, num_workers, num_parts, **context):
    """Take a worker's micro-batches, accumulated without averaging until the last."""
    torch.manual_seed(0)
    model = Sequences().double()
    wrapped = DistributedDataParallel(model) if num_workers > 1 else model
    batch = tokens()
    parts = batch.split(NUM_SAMPLES // (num_workers * num_parts))[rank::num_workers]
    micro, samples = MicroBatchNorms(model.parameters()), SampleNorms(model)
    with micro, samples:
        for index, part in enumerate(parts):
            is_last = index + 1 == len(parts)
            keep_apart = num_workers > 1 and not is_last
            with wrapped.no_sync() if keep_apart else contextlib.nullcontext():
                loss = loss_sum(wrapped(part), part) / num_targets(batch)
                (loss * num_workers).backward()  # averaged over workers afterwards
    count = len(parts)
    return [micro.noise(count, NUM_SAMPLES)[:3], samples.noise(count, NUM_SAMPLES)[:3]]


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = measure(rank, 2, 2)
    norms = MicroBatchNorms(torch.nn.Linear(1, 1).parameters())
    try:
        norms.noise(2 + rank, 8)
        said = ""
    except ValueError as error:
        said = str(error)
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump({"noise": result, "said": said}, file)
    gc.collect()  # so that nothing holds the group in a cycle until the process ends
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    run_workers(worker, str(folder))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_workers_see_the_noise_of_all_micro_batches(results):
    alone = measure(0, 1, 4)
    for result in results:
        for noise, expected in zip(result["noise"], alone, strict=True):
            # The same sums in another order, in float64.
            assert noise == pytest.approx(expected, rel=1e-12)


def test_workers_with_different_numbers_of_micro_batches_are_refused_everywhere(results):
    assert all("different numbers of micro-batches" in result["said"] for result in results)
