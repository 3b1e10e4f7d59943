"""Statistics of samples and micro-batches: exact, equal to each other, and without side effects."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import BertConfig, BertForSequenceClassification

from adarankgrad.core.gradient_noise import (
    SampleSums,
    noise_of_samples,
    pool,
    squared_norm_of_grads,
)
from adarankgrad.schedules.adadagrad import MicroBatchNorms, SampleNorms, per_sample_sums

from .models import (
    NUM_SAMPLES,
    Sequences,
    backward,
    loss_sum,
    mean_grads,
    num_targets,
    rows_of_samples,
    tokens,
)

# Sums of a few hundred products in float64.
FLOAT64 = 1e-12


@pytest.fixture
def model():
    return Sequences().double()


def exact_sums(model, batch, size=NUM_SAMPLES, chunk_size=3):
    def share(call, sample):
        return loss_sum(call(sample["tokens"]), sample["tokens"]) / num_targets(batch)

    total = SampleSums(0, 0.0, 0.0, 0.0)
    for part in batch.split(size):
        sums = per_sample_sums(
            model,
            share,
            {"tokens": part},
            mean_grads(model),
            num_samples=len(batch),
            chunk_size=chunk_size,
        )
        total = pool(total, sums)
    return total


@pytest.mark.parametrize(("size", "chunk_size"), [(8, 3), (2, 1), (4, 8)])
def test_per_sample_sums_are_those_of_a_loop_over_samples(model, size, chunk_size):
    batch = tokens()
    backward(model, batch, 8)
    rows = rows_of_samples(model, batch)
    mean = rows.mean(0)
    # Sequences of different lengths are weighted so that the mean is the batch's gradient.
    grads = torch.cat([grad.flatten() for grad in mean_grads(model).values()])
    assert torch.allclose(mean, grads, rtol=FLOAT64, atol=1e-14)
    sums = exact_sums(model, batch, size, chunk_size)
    inner = rows @ mean
    expected = (
        NUM_SAMPLES,
        float(rows.square().sum()),
        float(inner.sum()),
        float(inner.square().sum()),
    )
    assert sums == pytest.approx(expected, rel=FLOAT64)


def test_padded_samples_of_a_model_that_reads_its_mask_are_taken_one_by_one():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "vocab_size": 11, "max_position_embeddings": 8}
    model = BertForSequenceClassification(BertConfig(**sizes, hidden_dropout_prob=0.0)).double()
    batch = {"input_ids": tokens()[:3, :6], "labels": torch.tensor([0, 1, 1])}
    batch["attention_mask"] = (torch.arange(6) < torch.tensor([[6], [4], [2]])).long()

    def share(call, sample):
        return call(**sample).loss * len(sample["labels"]) / 3

    rows = []
    for number in range(3):
        sample = {name: value[number : number + 1] for name, value in batch.items()}
        grads = torch.autograd.grad(3 * share(model.eval(), sample), list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    model(**batch).loss.backward()
    sums = per_sample_sums(model, share, batch, mean_grads(model), num_samples=3)
    inner = torch.stack(rows) @ torch.stack(rows).mean(0)
    squared = torch.stack(rows).square().sum()
    expected = (3, float(squared), float(inner.sum()), float(inner.square().sum()))
    assert sums == pytest.approx(expected, rel=FLOAT64)
    with pytest.raises(ValueError, match="use chunk_size=1"):
        per_sample_sums(model, share, batch, mean_grads(model), num_samples=3, chunk_size=2)


@pytest.mark.parametrize("size", [8, 4, 1])
def test_sample_norms_give_the_same_variance_in_an_ordinary_backward_pass(model, size):
    batch = tokens()
    norms = SampleNorms(model)
    with norms:
        count = backward(model, batch, size)
    noise = norms.noise(count, NUM_SAMPLES)
    exact = noise_of_samples(exact_sums(model, batch), squared_norm_of_grads(model.parameters()))
    assert noise[:3] == pytest.approx(exact[:3], rel=FLOAT64)


def test_micro_batches_of_one_sample_give_the_same_variance(model):
    batch = tokens()
    norms = MicroBatchNorms(model.parameters())
    with norms:
        backward(model, batch, 1)
    noise = norms.noise(NUM_SAMPLES, NUM_SAMPLES)
    exact = noise_of_samples(exact_sums(model, batch), noise.squared_mean)
    assert noise[:3] == pytest.approx(exact[:3], rel=FLOAT64)


def test_micro_batches_are_read_from_their_own_gradients(model):
    batch = tokens()
    norms = MicroBatchNorms(model.parameters())
    with norms:
        backward(model, batch, 2)
    noise = norms.noise(4, NUM_SAMPLES)
    parts = 4 * torch.stack([share_of(model, part, batch) for part in batch.split(2)])
    spread = float((parts - parts.mean(0)).square().sum()) / 3
    assert noise.variance == pytest.approx(spread * 2, rel=FLOAT64)
    assert noise.squared_mean == pytest.approx(float(parts.mean(0).square().sum()), rel=FLOAT64)


def share_of(model, part, batch):
    loss = loss_sum(model(part), part) / num_targets(batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_a_tied_weight_is_read_once_with_all_of_its_gradient(model):
    model.head.weight, model.up = (
        nn.Parameter(torch.randn(11, 6).double()),
        nn.Linear(6, 6).double(),
    )
    model.embed.weight = model.head.weight
    batch = tokens()
    norms = MicroBatchNorms(model.parameters())
    with norms:
        backward(model, batch, 1)
    rows = rows_of_samples(model, batch)
    spread = float((rows - rows.mean(0)).square().sum()) / (NUM_SAMPLES - 1)
    assert norms.noise(8, 8).variance == pytest.approx(spread, rel=FLOAT64)
    with pytest.raises(ValueError, match="embed and head share a weight"):
        SampleNorms(model)


def test_nothing_is_changed_by_measuring():
    plain = Sequences(dropout=0.5)
    measured, batch = copy.deepcopy(plain), tokens()
    measured.register_buffer("counter", torch.zeros(()))
    states = []
    for model in (plain, measured):
        torch.manual_seed(3)
        if model is plain:
            backward(model, batch, 2)
        else:
            with MicroBatchNorms(model.parameters()), SampleNorms(model):
                backward(model, batch, 2)
            exact_sums(model, batch, 2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    grads, others = mean_grads(plain), mean_grads(measured)
    assert all(torch.equal(grads[name], others[name]) for name in grads)
    assert not measured._forward_hooks and not any(p._backward_hooks for p in measured.parameters())


def test_batch_normalisation_is_refused_while_it_normalises_over_the_batch():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    inputs = torch.randn(4, 3)
    model(inputs).mean().backward()
    before = copy.deepcopy(model.state_dict())

    def sums():
        return per_sample_sums(
            model,
            lambda call, sample: call(sample["x"]).mean() / 4,
            {"x": inputs},
            mean_grads(model),
            num_samples=4,
        )

    with pytest.raises(ValueError, match="1 normalises over the batch"):
        sums()
    model.eval()
    sums()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_whose_samples_cannot_be_told_apart_are_refused():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 1)

        def forward(self, inputs):
            return self.head(self.table(torch.arange(6)[None]) + inputs)

    model = Positions()
    norms = SampleNorms(model)
    with norms:
        model(torch.randn(3, 6, 4)).sum().backward()
    with pytest.raises(ValueError, match="table saw 1 of 3 samples"):
        norms.noise(1, 3)
    model.head = nn.Bilinear(4, 4, 1)
    norms = SampleNorms(model)
    with norms:
        model.head(torch.ones(3, 4), torch.ones(3, 4)).sum().backward()
    with pytest.raises(ValueError, match="head has not one tensor as input"):
        norms.noise(1, 3)
    model.head = nn.Linear(4, 1)
    parametrize.register_parametrization(model.head, "weight", nn.Identity())
    with pytest.raises(ValueError, match="parametrised"):
        SampleNorms(model)


def test_a_layer_that_is_used_twice_is_refused():
    model = nn.Linear(3, 3)
    norms = SampleNorms(model)
    with norms:
        model(model(torch.randn(2, 3))).sum().backward()
    with pytest.raises(ValueError, match="saw 4 of 2 samples"):
        norms.noise(1, 2)


def test_a_gradient_that_comes_in_parts_is_refused():
    weight = nn.Parameter(torch.ones(2))
    norms = MicroBatchNorms([weight])
    with norms:
        for _ in range(3):
            weight.sum().backward()
    with pytest.raises(ValueError, match="3 gradients in 2"):
        norms.noise(2, 4)


def test_one_micro_batch_has_no_spread():
    weight = nn.Parameter(torch.ones(2))
    norms = MicroBatchNorms([weight])
    with norms:
        weight.sum().backward()
    with pytest.raises(ValueError, match="no spread"):
        norms.noise(1, 4)
