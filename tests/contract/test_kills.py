"""A plain training loop that is killed by SIGKILL, saving as docs/checkpoints.md says."""

from __future__ import annotations

import io
import os
import random

import torch

import killed
from same_values import assert_same_values

from .cases import CASES
from .problems import make_params, train

STEPS = 6


class Deadly:
    """Ends this process at the n-th call of one kind: ``write``, ``fsync`` or ``replace``."""

    def __init__(self, kind=None, number=None):
        self.kind, self.left = kind, number

    def note(self, kind):
        if kind == self.kind:
            self.left -= 1
            if self.left == 0:
                killed.die()


class DeadlyFile(io.FileIO):
    def __init__(self, path, deadly):
        super().__init__(path, "wb")
        self.deadly = deadly

    def write(self, data):
        half = len(data) // 2
        super().write(data[:half])
        self.deadly.note("write")
        return half + super().write(data[half:])


def save(content, path, deadly):
    """Write beside, flush, rename: the file is the old one or the new one."""
    with DeadlyFile(f"{path}.partial", deadly) as file:
        torch.save(content, file)
        deadly.note("fsync")
        os.fsync(file.fileno())
    deadly.note("replace")
    os.replace(f"{path}.partial", path)


def run(path, kind=None, number=None):
    """Train with every optimizer at once; save after each step until the end or a kill."""
    deadly = Deadly(kind, number)
    runs = {}
    for case in CASES:
        is_rounded = "weight_rounding" in case.options
        params = make_params(torch.bfloat16 if is_rounded else torch.float32)
        runs[case.name] = (params, case.build(params))
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved["step"]
        for name, (params, optimizer) in runs.items():
            optimizer.load_state_dict(saved[name]["optimizer"])
            for (_, param), value in zip(params, saved[name]["weights"], strict=True):
                param.data.copy_(value)
    for step in range(first, STEPS):
        content = {"step": step + 1}
        for name, (params, optimizer) in runs.items():
            train(optimizer, params, [step])
            weights = [param.detach() for _, param in params]
            content[name] = {"optimizer": optimizer.state_dict(), "weights": weights}
        save(content, path, deadly)


def test_every_optimizer_goes_on_bit_for_bit_after_each_kill(tmp_path):
    run(tmp_path / "whole.pt")
    path = tmp_path / "parts.pt"
    writes = random.Random(5)
    for kind, number in (
        ("write", writes.randrange(1, 3000)),
        ("fsync", 2),
        ("write", writes.randrange(1, 3000)),
        ("replace", 1),
        ("write", writes.randrange(1, 3000)),
        ("replace", 2),
    ):
        process = killed.start(run, path, kind, number)
        process.join()
        assert killed.was_killed(process)
    killed.finish(run, path)
    assert_same_values(torch.load(tmp_path / "whole.pt"), torch.load(path))
