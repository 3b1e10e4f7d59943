"""The examples of docs/checkpoints.md run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_examples_on_checkpoints_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / "checkpoints.md").read_text(), re.M | re.S
    )
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/checkpoints.md", "exec"), names)
