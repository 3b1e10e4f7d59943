"""Private random generators, so that a training depends on nothing but its seed."""

from __future__ import annotations

import hashlib

import torch


def generator_for(device: torch.device, seed: int, name: str, count: int) -> torch.Generator:
    """A generator of its own for every purpose, weight and count; the global one is not touched."""
    digest = hashlib.blake2b(f"{seed}/{name}/{count}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))
