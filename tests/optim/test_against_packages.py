"""GaLore and Fira are what their authors' packages are: galore-torch 1.0 and fira 1.0.2."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from adarankgrad import AdaRankGrad, Fira, GaLore

from .gradient_streams import drifting_gradients

SHAPES = [(24, 10), (10, 24), (12, 12)]
RANK, GAP, NUM_STEPS = 4, 15, 120
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
EPS32 = torch.finfo(torch.float32).eps


def adamw_of(package: str, module: str, monkeypatch):
    """Import one module's ``AdamW`` without the package's __init__, which may need bitsandbytes."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"the {package} package, the oracle of this test, is not installed")
    pytest.importorskip("transformers", reason=f"{package} imports transformers")
    stub = types.ModuleType(package)
    stub.__path__ = list(spec.submodule_search_locations)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, stub)
    loaded = importlib.import_module(f"{package}.{module}")
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return loaded.AdamW


@pytest.fixture
def galore_adamw(monkeypatch):
    return adamw_of("galore_torch", "adamw", monkeypatch)


@pytest.fixture
def fira_adamw(monkeypatch):
    return adamw_of("fira", "fira_adamw", monkeypatch)


def run(optimizer, weights, gradients):
    for step_gradients in gradients:
        for weight, grad in zip(weights, step_gradients, strict=True):
            weight.grad = grad.to(weight.dtype).contiguous()
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def problem(shape, num_steps=NUM_STEPS):
    """A matrix and a vector with the gradients that they get at each step."""
    start = [torch.randn(shape), torch.randn(shape[0])]
    gradients = [(grad, grad[:, 0]) for grad in drifting_gradients(*shape, num_steps)]
    return start, gradients


def parameters(start):
    return [torch.nn.Parameter(tensor.clone()) for tensor in start]


def tolerance(start, num_steps, step_size):
    """Each step has some twenty roundings of its own size and one of the weight's, on both sides.

    Both decompose the same stored matrix, so that even the signs of the bases agree, and a
    direction differs by roundings only.
    """
    largest = max(tensor.abs().max().item() for tensor in start)
    return num_steps * EPS32 * (20 * step_size + largest)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("side", "proj_type"), [("short", "std"), ("long", "reverse_std")])
def test_galore_is_galore_torch_through_eight_refreshes(galore_adamw, shape, side, proj_type):
    """With eps and weight decay large enough that their place would be noticed."""
    start, gradients = problem(shape)
    theirs, ours = parameters(start), parameters(start)
    projection = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    galore = galore_adamw(
        [{"params": [theirs[0]], **projection}, {"params": [theirs[1]]}],
        **OPTIONS,
        no_deprecation_warning=True,
    )
    optimizer = GaLore(ours, **OPTIONS, rank=RANK, refresh_every=GAP, scale=0.25, side=side)
    expected, result = run(galore, theirs, gradients), run(optimizer, ours, gradients)
    layer = optimizer.report().layers[0]
    assert (layer.rank, layer.num_refreshes) == (RANK, NUM_STEPS // GAP)
    allowed = tolerance(start, NUM_STEPS, OPTIONS["lr"] * RANK**0.5)
    for part, other, begin in zip(result, expected, start, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=allowed)
        assert (part - begin).abs().max() > 100 * allowed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_fira_is_the_fira_package_through_eight_refreshes(fira_adamw, shape, scale):
    """Gradients jump tenfold now and then, so that the limiter acts."""
    start, gradients = problem(shape)
    gradients = [
        tuple(grad * (10.0 if step % 13 == 5 else 1.0) for grad in pair)
        for step, pair in enumerate(gradients)
    ]
    theirs, ours = parameters(start), parameters(start)
    projection = {"rank": RANK, "update_proj_gap": GAP, "alpha": scale, "proj_type": "std"}
    fira = fira_adamw(
        [{"params": [theirs[0]], **projection}, {"params": [theirs[1]]}],
        **OPTIONS,
        no_deprecation_warning=True,
    )
    optimizer = Fira(
        ours, **OPTIONS, rank=RANK, refresh_every=GAP, scale=scale, residual="official"
    )
    expected, result = run(fira, theirs, gradients), run(optimizer, ours, gradients)
    # A step is lr times a direction whose column norm the residual takes over: at most √rank, and
    # the gradients' columns outside the basis are at most ten times those inside.
    allowed = tolerance(start, NUM_STEPS, 10 * OPTIONS["lr"] * RANK**0.5)
    for part, other, begin in zip(result, expected, start, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=allowed)
        assert (part - begin).abs().max() > 100 * allowed


@pytest.mark.parametrize("difference", ["paper residual", "torch convention", "no limiter"])
def test_what_the_comparison_with_fira_can_tell(fira_adamw, difference, monkeypatch):
    start, gradients = problem((10, 24), 40)
    gradients = [
        tuple(grad * (10.0 if step == 20 else 1.0) for grad in pair)
        for step, pair in enumerate(gradients)
    ]
    theirs, ours = parameters(start), parameters(start)
    group = {"params": theirs[:1], "rank": 4, "update_proj_gap": 15, "alpha": 0.25}
    fira = fira_adamw(
        [{**group, "proj_type": "std"}, {"params": theirs[1:]}],
        **OPTIONS,
        no_deprecation_warning=True,
    )
    changes = {"residual": "official"}
    if difference == "paper residual":
        changes = {"residual": "paper"}
    elif difference == "torch convention":
        changes["adam_convention"] = "torch"
    else:
        monkeypatch.setattr(
            "adarankgrad.optim.matrix_step.limit_growth", lambda residual, *_, **__: residual
        )
    optimizer = Fira(ours, **OPTIONS, rank=4, refresh_every=15, scale=0.25, **changes)
    expected, result = run(fira, theirs, gradients), run(optimizer, ours, gradients)
    allowed = tolerance(start, 40, 10 * OPTIONS["lr"] * RANK**0.5)
    assert (result[0] - expected[0]).abs().max() > 10 * allowed


@pytest.mark.parametrize("carry", ["squared", "ldadam", "published", "reset"])
def test_every_other_carry_is_not_galore(galore_adamw, carry):
    """The comparison above can tell: with carried moments the weights part at the first refresh."""
    start, gradients = problem((10, 24), 40)
    theirs, ours = parameters(start), parameters(start)
    group = {"params": theirs[:1], "rank": 4, "update_proj_gap": 15, "scale": 1.0}
    galore = galore_adamw(
        [{**group, "proj_type": "std"}, {"params": theirs[1:]}],
        lr=0.01,
        no_deprecation_warning=True,
    )
    optimizer = AdaRankGrad(
        ours,
        lr=0.01,
        max_rank=4,
        min_rank=4,
        energy=1.0,
        basis="exact",
        refresh_max_gap=15,
        carry=carry,
        bias_correction="global",
        eps=1e-6,
        adam_convention="transformers",
        residual="none",
    )
    before = [run(galore, theirs, gradients[:15])[0], run(optimizer, ours, gradients[:15])[0]]
    torch.testing.assert_close(*before, rtol=0, atol=1e-4)
    after = [run(galore, theirs, gradients[15:])[0], run(optimizer, ours, gradients[15:])[0]]
    assert (after[0] - after[1]).abs().max() > 0.01
