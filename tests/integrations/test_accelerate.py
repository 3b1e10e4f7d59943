"""A loop with accelerate projects gradients in the backward pass by one call."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from adarankgrad.integrations.accelerate import accumulate_in_backward
from adarankgrad.optim.projected_grad import ProjectedGrad

COUNT = 4


def train(pair, sequences, *, in_backward):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=COUNT)
    model, optimizer = pair
    batches = torch.utils.data.DataLoader(sequences, batch_size=2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    if in_backward:
        accumulate_in_backward(accelerator, optimizer, model)
    weight = model.model.layers[0].mlp.up_proj.weight
    for _ in range(2):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                assert isinstance(weight.grad, ProjectedGrad) == in_backward
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1e9)
                optimizer.step()
                optimizer.zero_grad()
    return list(model.parameters())


@pytest.mark.parametrize("residual", ["none", "orthogonalized"])
def test_a_loop_with_accelerate_trains_as_without_hooks(pair, sequences, residual):
    # A small rate, since with a residual later micro-batches see weights that have moved.
    options = {"residual": residual, "lr": 1e-2 if residual == "none" else 1e-6}
    start = list(pair()[0].parameters())
    expected = train(pair(**options), sequences, in_backward=False)
    result = train(pair(**options), sequences, in_backward=True)
    for before, left, right in zip(start, expected, result, strict=True):
        if residual == "none":  # the rounding of float64, as in test_transformers
            torch.testing.assert_close(left, right, rtol=0, atol=8 * 1e-2 * 1e6 * 2.2e-16 * 20)
        else:
            # Four directions that differ are shorter in the mean than one of their mean is: the
            # documented difference. They point to the same side.
            moved, expected_move = (right - before).flatten(), (left - before).flatten()
            cosine = torch.nn.functional.cosine_similarity(moved, expected_move, dim=0)
            assert cosine > 0.5


def test_an_optimizer_of_another_package_is_refused(pair):
    accelerator = Accelerator(cpu=True)
    model, _ = pair()
    other = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"got torch\.optim\.adamw\.AdamW"):
        accumulate_in_backward(accelerator, other, model)
