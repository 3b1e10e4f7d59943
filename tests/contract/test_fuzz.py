"""Any shape, dtype, option and order of events: hypothesis looks for one that breaks a promise.

More examples: ``FUZZ_EXAMPLES=20000 pytest tests/contract/test_fuzz.py``.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from adarankgrad.core.projection import layout_of
from adarankgrad.core.residual import STATELESS_RESIDUALS
from adarankgrad.optim.options import correction_bytes
from adarankgrad.optim.stored_state import as_computed

from .cases import CASES
from .problems import assert_same_bits, assert_same_state, random_tensor, state_snapshot, weights_of
from .test_memory import expected_bytes, held_bytes, sketch_bytes

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "250"))

SIDES = st.sampled_from([0, 1, 1, 2, 3, 5, 8, 13])
DTYPES = st.sampled_from(
    [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
)
LAYOUTS = st.sampled_from(["contiguous", "contiguous", "transposed", "strided", "channels_last"])
GRADIENTS = st.sampled_from(
    ["normal", "normal", "rank one", "zero", "missing", "nan", "infinite", "huge", "tiny"]
)
# Of these, an optimizer draws those that its constructor has.
OPTIONS: dict[str, list[Any]] = {
    "lr": [0.0, 1e-3, 0.02],
    "betas": [(0.9, 0.999), (0.0, 0.9), (0.5, 0.9)],
    "eps": [1e-8, 1e-6, 0.0],
    "weight_decay": [0.0, 0.1],
    "max_rank": [1, 3, 64, 0.25, 1.0],
    "rank": [1, 3, 64, 0.25, 1.0],
    "min_rank": [None, 1, 2, 0.1],
    "energy": [0.5, 0.9, 1.0],
    "rank_multiple": [1, 4],
    "monotone": [False, True],
    "side": ["short", "long"],
    "basis": ["randomized", "exact", "sketched", "none"],
    "oversampling": [0, 2, 0.5],
    "power_iterations": [0, 1, 2],
    "warm_start": [False, True],
    "refresh_max_gap": [1, 2, 5],
    "refresh_every": [1, 2, 5],
    "refresh_min_gap": [1, 2],
    "refresh_norm": [None, 1e-3],
    "refresh_relative_norm": [None, 0.5],
    "refresh_energy": [None, 0.8],
    "stagger": [False, True],
    "carry": ["squared", "ldadam", "published", "keep", "reset"],
    "bias_correction": ["per_direction", "global"],
    "update": ["adam", "orthogonalized"],
    "residual": ["none", "orthogonalized", "normalized", "fira", "fira_official", "official"],
    "residual_scale": [0.0, 1.0],
    "adam_convention": ["torch", "transformers"],
    "memory_budget": [None, 0.5, "1MiB"],
    "max_grad_norm": [None, 0.0, 0.5],
    "state_dtype": ["float32", "bfloat16", "int8"],
    "basis_dtype": ["float32", "bfloat16", "int8"],
    "weight_rounding": ["nearest", "stochastic", "corrected"],
}


@st.composite
def weights(draw):
    shape = tuple(draw(st.lists(SIDES, max_size=4)))
    return shape, draw(DTYPES), draw(LAYOUTS), draw(st.booleans())


@st.composite
def optimizers(draw):
    case = draw(st.sampled_from(CASES))
    names = sorted(set(OPTIONS) & set(case.option_names()))
    chosen = draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    options = {name: draw(st.sampled_from(OPTIONS[name])) for name in chosen}
    options["nonfinite"] = draw(st.sampled_from(["skip", "skip", "raise", "ignore"]))
    # By chance alone few could accumulate in the backward pass.
    if "update" in names and draw(st.booleans()):
        options |= {
            "basis": "sketched",
            "residual": draw(st.sampled_from(["none", *STATELESS_RESIDUALS])),
        }
    return case, options


EVENTS = st.one_of(
    st.tuples(st.just("step"), st.lists(GRADIENTS, min_size=1, max_size=4)),
    st.tuples(st.just("step"), st.lists(GRADIENTS, min_size=1, max_size=4)),
    st.tuples(st.just("step"), st.just(["normal"])),
    st.tuples(st.just("backward"), st.lists(GRADIENTS, min_size=1, max_size=4)),
    st.tuples(st.just("resume"), st.just(None)),
    st.tuples(st.just("lr"), st.sampled_from([0.0, 1e-4, 0.01])),
    st.tuples(st.just("add"), weights()),
)


def make_weight(name, shape, dtype, layout):
    return name, Parameter(laid_out(random_tensor(shape, "weight", name).to(dtype), layout))


def laid_out(value, layout):
    if layout == "transposed" and value.dim() > 1:
        value = value.mT.contiguous().mT
    elif layout == "strided" and value.dim() > 0:
        value = torch.stack([value, value], -1)[..., 0]
    elif layout == "channels_last" and value.dim() == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    return value


def make_gradient(kind, name, param, step):
    if kind == "missing":
        return None
    grad = random_tensor(param.shape, "gradient", name, step).to(param.dtype)
    if kind == "rank one" and param.dim() > 1:
        return grad[..., :1] * torch.ones_like(grad)
    if kind in ("zero", "tiny"):
        return torch.full_like(grad, 0.0 if kind == "zero" else 1e-40)
    broken = {"nan": torch.nan, "infinite": -torch.inf, "huge": 6e4}
    if kind in broken and grad.numel():
        is_wide = grad.dtype not in (torch.float16, torch.bfloat16)
        grad.view(-1)[-1] = 1e18 if kind == "huge" and is_wide else broken[kind]
    return grad


class Training:
    """Weights and their optimizer, and what holds after each event."""

    def __init__(self, case, options, first):
        self.case, self.options, self.step = case, options, 0
        self.is_broken = False
        self.params, self.layouts = [make_weight("w0", *first[:3])], [first[2]]
        self.groups = [self.group(*self.params[0], first)]
        self.optimizer = self.build()

    @staticmethod
    def group(name, param, drawn):
        return {"params": [(name, param)], "stacked": drawn[3] and param.dim() == 3}

    def build(self):
        return self.case.build([dict(group) for group in self.groups], **self.options)

    def add(self, drawn):
        name = f"w{len(self.params)}"
        member = make_weight(name, *drawn[:3])
        group = self.group(*member, drawn)
        self.optimizer.add_param_group(dict(group))
        self.params.append(member)
        self.layouts.append(drawn[2])
        self.groups.append(group)

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def gradients(self, kinds):
        return [
            make_gradient(kinds[index % len(kinds)], name, param, self.step)
            for index, (name, param) in enumerate(self.params)
        ]

    def take_step(self, kinds):
        before = weights_of(self.params)
        grads = self.gradients(kinds)
        for (_, param), grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.step_optimizer(grads)
        for name, param in self.params:
            if param.grad is None:
                assert torch.equal(param, before[name]) or self.is_broken, name
        self.check()

    def step_optimizer(self, grads):
        is_finite = all(grad is None or bool(torch.isfinite(grad).all()) for grad in grads)
        nonfinite = self.optimizer.defaults["nonfinite"]
        self.is_broken |= nonfinite == "ignore" and not is_finite
        before, state = weights_of(self.params), state_snapshot(self.optimizer)
        try:
            self.optimizer.step()
        except FloatingPointError:
            assert nonfinite == "raise"
            assert_same_bits(weights_of(self.params), before)
            assert_same_state(state_snapshot(self.optimizer), state)
        else:
            assert is_finite or nonfinite != "raise"
        self.step += 1

    def step_in_backward(self, kinds):
        """Two micro-batches whose gradients are projected as they become final, where they can."""
        weights = torch.nn.ParameterList(param for _, param in self.params)
        try:
            handle = self.optimizer.accumulate_in_backward(weights, num_micro_batches=2)
        except ValueError as error:
            assert REFUSED_IN_BACKWARD.search(str(error)), error
            return
        self.optimizer.zero_grad()
        grads = self.gradients(kinds)
        for _ in range(2):
            for param, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    torch.real(param * grad).sum().backward()
        self.step_optimizer(grads)
        self.optimizer.zero_grad()
        handle.remove()
        self.check()

    def resume(self, _):
        """Continue beside a copy that went through a file; both must go the same way."""
        if self.is_broken:  # by what is not a number, and equals nothing
            return
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        left = self.params, self.optimizer
        copies = [
            (name, Parameter(laid_out(param.detach().clone(), layout)))
            for (name, param), layout in zip(self.params, self.layouts, strict=True)
        ]
        self.groups = [
            {**group, "params": [copy]} for group, copy in zip(self.groups, copies, strict=True)
        ]
        self.params, self.optimizer = copies, self.build()
        self.optimizer.load_state_dict(state)
        for params, optimizer in (left, (self.params, self.optimizer)):
            for name, param in params:
                param.grad = make_gradient("normal", name, param, self.step)
            optimizer.step()
        self.step += 1
        assert_same_bits(weights_of(self.params), weights_of(left[0]))
        assert_same_state(state_snapshot(self.optimizer), state_snapshot(left[1]))

    def check(self):
        for name, param in self.params:
            assert bool(torch.isfinite(param).all()) or self.is_broken, name
            for key, value in self.optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and key != "residual_norm":
                    assert bool(torch.isfinite(value).all()) or self.is_broken, f"{name} {key}"
            if "basis" in self.optimizer.state.get(param, {}):
                self.check_projected(param)

    def check_projected(self, param):
        state = self.optimizer.state[param]
        (group,) = (g for g in self.optimizer.param_groups if any(p is param for p in g["params"]))
        layout = layout_of(param.shape, group["side"], is_stacked=group["stacked"])
        basis = as_computed(state, group)["basis"]
        expected = expected_bytes(self.optimizer, layout, basis.shape[-1], basis.element_size())
        expected += sketch_bytes(self.optimizer, param) + correction_bytes(param, group)
        assert held_bytes(self.optimizer, param) == expected
        wide = basis.double()
        identity = torch.eye(basis.shape[-1], dtype=torch.float64)
        # A hundred roundings of a range (`core.range_finder.orthonormalize`), and LAPACK's bound on
        # singular vectors within it: a modest multiple of as many roundings as the sides.
        allowed = (100 + 2 * sum(param.shape)) * 1.2e-7
        # Columns of length 1 that are off by e each have products that are off by 2e + e².
        off = COLUMN_ERRORS[group["basis_dtype"]]
        error = (wide.mT @ wide - identity).abs().amax() if wide.numel() else torch.zeros(())
        assert float(error) < allowed + 2 * off + off**2


# By derivation (docs/method.md).
COLUMN_ERRORS = {"float32": 0.0, "bfloat16": 0.004, "int8": 0.031}

REFUSED_IN_BACKWARD = re.compile(
    "needs basis='sketched'|needs the whole gradient|no projected weight"
)

HANDLERS = {
    "step": Training.take_step,
    "backward": Training.step_in_backward,
    "resume": Training.resume,
    "lr": Training.set_lr,
    "add": Training.add,
}


@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(optimizers(), weights(), st.lists(EVENTS, min_size=1, max_size=8))
def test_whatever_is_accepted_trains_and_resumes(optimizer, first, events):
    case, options = optimizer
    with warnings.catch_warnings():
        # Of complex matrices and of vectors in the shape of one, which AdamW trains.
        warnings.filterwarnings("ignore", message=".*it is trained by plain AdamW")
        warnings.filterwarnings("ignore", message=".*is complex; its moments are kept in")
        warnings.filterwarnings("ignore", message="weight_rounding=.* has no effect")
        try:
            training = Training(case, options, first)
        except ValueError as error:  # a clear refusal names an option
            assert any(name in str(error) for name in (*OPTIONS, "memory_budget")), error
            return
        for kind, argument in events:
            try:
                HANDLERS[kind](training, argument)
            except ValueError as error:
                assert kind == "add", error
                assert "memory_budget" in str(error) or "weight_rounding" in str(error), error


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.bool], ids=str)
def test_a_weight_that_cannot_be_trained_is_refused_by_name(case, dtype):
    param = Parameter(torch.ones(6, 5).to(dtype), requires_grad=False)
    optimizer = case.build([("gate", param)])
    optimizer.step()  # frozen, it may be there
    param.grad = torch.ones(6, 5).to(dtype)
    with pytest.raises(ValueError, match=r"gate \(6, 5\) is of torch.*can be trained in float32"):
        optimizer.step()
