"""Imports point down: `core` at the bottom, `cli` at the top, and the library needs torch alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "adarankgrad"

# What each layer may import of ours, besides itself.
METHODS = {"optim", "adapters", "reparam", "schedules"}
ALLOWED_LAYERS = {
    "core": set(),
    "reference": set(),
    **{layer: {"core"} for layer in METHODS},
    "train": {"core", *METHODS},
    "finetune": {"core", "train", "fetch", *METHODS},
    "integrations": {"core", "train", *METHODS},
    "compare": {"train", "finetune"},
    "memory_plan": {"core", "optim", "train"},
    "fetch": {"train"},
    "generate": {"train", "fetch"},
    "cli": {"train", "finetune", "compare", "memory_plan", "fetch", "generate"},
    "root": {"core", "optim"},
}
# Layers that a user gets with `pip install adarankgrad`, without the extra.
TORCH_ONLY = {"core", "reference", "optim", "reparam", "schedules", "root"}
# Layers that are silent: they return values and raise errors.
SILENT = {"core", "reference", "root", *METHODS}

SOURCES = sorted(PACKAGE.rglob("*.py"))
OTHER_SOURCES = sorted(
    path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
)


def layer_of(path: Path) -> str:
    if path.name == "__main__.py":
        return "cli"
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "root"


def imported_names(source: str, package: tuple[str, ...] = ()) -> Iterator[str]:
    """Absolute dotted names of everything a file imports, `from x import y` as `x.y`.

    `package` is the dotted path of the file's folder, which relative imports start from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    package = path.relative_to(PACKAGE.parent).parent.parts if path.is_relative_to(PACKAGE) else ()
    return set(imported_names(path.read_text(encoding="utf-8"), package))


def imported_layer(name: str) -> str | None:
    """Layer that an import reaches, or None if it is not ours or only the version."""
    first, *rest = name.split(".")
    if first != "adarankgrad" or rest == ["__version__"]:
        return None
    # The package itself offers the optimizers.
    return rest[0] if rest and rest[0] in ALLOWED_LAYERS else "optim"


def violations(layer: str, names: set[str]) -> set[str]:
    """Imports that a layer must not have."""
    wrong = set()
    for name in names:
        target = imported_layer(name)
        if target is not None and target != layer and target not in ALLOWED_LAYERS[layer]:
            wrong.add(name)
        top = name.partition(".")[0]
        is_third_party = top not in sys.stdlib_module_names and top not in ("adarankgrad", "torch")
        if layer in TORCH_ONLY and is_third_party:
            wrong.add(name)
        if layer in SILENT and top == "logging":
            wrong.add(name)
    return wrong


def relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_folder_of_the_package_is_a_layer_with_a_rule():
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert folders <= set(ALLOWED_LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=relative_name)
def test_imports_point_down(path):
    assert violations(layer_of(path), imports_of(path)) == set()


@pytest.mark.parametrize("path", SOURCES + OTHER_SOURCES, ids=relative_name)
def test_only_tests_import_the_reference(path):
    is_reference = path.is_relative_to(PACKAGE / "reference")
    reached = {name for name in imports_of(path) if imported_layer(name) == "reference"}
    assert is_reference or not reached


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if layer_of(path) in SILENT], ids=relative_name
)
def test_the_library_never_prints(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "print" not in names


@pytest.mark.parametrize(
    ("layer", "source", "forbidden"),
    [
        ("core", "from ..optim.engine import Group", "adarankgrad.optim.engine.Group"),
        ("core", "import logging", "logging"),
        ("core", "from logging import getLogger", "logging.getLogger"),
        ("reference", "from ..core.rank import choose_rank", "adarankgrad.core.rank.choose_rank"),
        ("reference", "from .. import core", "adarankgrad.core"),
        ("optim", "from ..train import data", "adarankgrad.train.data"),
        ("optim", "def f():\n    import rich", "rich"),
        ("schedules", "from adarankgrad.optim import groups", "adarankgrad.optim.groups"),
        ("train", "import adarankgrad.cli.main", "adarankgrad.cli.main"),
        ("cli", "from adarankgrad import AdaRankGrad", "adarankgrad.AdaRankGrad"),
        ("cli", "from ..optim import AdaRankGrad", "adarankgrad.optim.AdaRankGrad"),
    ],
)
def test_an_import_that_points_up_is_seen(layer, source, forbidden):
    names = set(imported_names(source, ("adarankgrad", layer)))
    assert violations(layer, names) == {forbidden}


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("optim", "from ..core.rank import choose_rank\nfrom .engine import Group\nimport torch"),
        ("train", "from adarankgrad import AdaRankGrad\nfrom ..core.rank import choose_rank"),
        ("cli", "from .. import __version__\nfrom ..train.config import TrainConfig\nimport rich"),
    ],
)
def test_an_import_that_points_down_is_allowed(layer, source):
    assert violations(layer, set(imported_names(source, ("adarankgrad", layer)))) == set()


def test_importing_the_package_after_torch_loads_nothing_but_itself():
    script = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import adarankgrad\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = json.loads(result.stdout)
    assert "adarankgrad" in loaded
    # torch's compiler takes longer to load than torch itself, and training does not need it.
    assert not [name for name in loaded if name.startswith("torch._dynamo")]
    tops = {name.partition(".")[0] for name in loaded}
    assert tops - set(sys.stdlib_module_names) <= {"adarankgrad", "torch"}
