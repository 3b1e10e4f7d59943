"""What every test needs: no network, one thread, and random numbers of its own."""

from __future__ import annotations

import gc
import os

# Read when the libraries are first imported, so they stand before any import of them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

# Tests are many and small: threads would wait for each other more than they work.
torch.set_num_threads(1)


def pytest_collection_finish():
    """Spare garbage collections what is imported by now: Trainer asks for one at each start."""
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers_in_any_order():
    """Seed torch before each test, so that a test sees the same numbers alone and in the suite."""
    torch.manual_seed(0)
