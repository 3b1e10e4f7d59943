"""Runs every test that asks for a `case` once for each optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import CASES


def pytest_collection_modifyitems(items):
    """Let cases that round be run on float32 weights as well, of which nothing is rounded."""
    mark = pytest.mark.filterwarnings("ignore:weight_rounding=.* has no effect:UserWarning")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(mark)


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param
