"""Runs every test that asks for a `case` once for each optimizer."""

from __future__ import annotations

import pytest

from .cases import CASES


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param
