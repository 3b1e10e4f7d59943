"""Models and batches whose samples' gradients can be taken one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_SAMPLES, SEQ_LEN, VOCAB = 8, 6, 11


class Sequences(nn.Module):
    """Embedding, a norm, linear layers with and without bias, a convolution: on token sequences."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.up = nn.Linear(6, 10)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(10, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        values = self.norm(self.embed(tokens))
        values = values + self.conv(values.mT).mT
        return self.head(self.dropout(torch.tanh(self.up(values))))


def tokens() -> Tensor:
    return torch.randint(VOCAB, (NUM_SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(5))


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over the tokens that are not padding: sequences weigh by their length."""
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum"
    )


def num_targets(batch: Tensor) -> int:
    return int(batch.ne(0).sum())


def backward(model: nn.Module, batch: Tensor, size: int) -> int:
    """Accumulate the gradient of the mean over all tokens; returns the number of micro-batches."""
    parts = batch.split(size)
    for part in parts:
        (loss_sum(model(part), part) / num_targets(batch)).backward()
    return len(parts)


def mean_grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of_samples(model: nn.Module, batch: Tensor) -> Tensor:
    """Each sample's gradient, its share in the loss times their number: (b, all weights)."""
    rows = []
    for sample in batch.split(1):
        loss = loss_sum(model(sample), sample) * (len(batch) / num_targets(batch))
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)
