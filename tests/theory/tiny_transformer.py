"""A transformer small enough to measure every gradient of, and text from a Markov chain for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, NUM_HEADS, LENGTH = 32, 32, 2, 16


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.output = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.attention_norm(hidden)
        heads = [
            layer(normed).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.output(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(nn.functional.gelu(self.up(self.mlp_norm(hidden))))


class TinyTransformer(nn.Module):
    """Two blocks between an embedding and a head; returns the mean next-token loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        inputs, targets = text[:, :-1], text[:, 1:]
        hidden = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.lm_head(self.norm(hidden))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def markov_text(num_sequences: int) -> Tensor:
    """Sequences whose next token depends on the last two, with a few likely successors each."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)
    transitions = torch.softmax(2.5 * scores, -1)
    text = torch.randint(0, VOCABULARY, (num_sequences, 2), generator=generator)
    for _ in range(LENGTH - 1):
        chances = transitions[text[:, -2], text[:, -1]]
        following = torch.multinomial(chances, 1, generator=generator)
        text = torch.cat([text, following], 1)
    return text
