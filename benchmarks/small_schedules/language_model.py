"""A small LLaMA on novels, trained with one of the schedules or none."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from glob import glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from adarankgrad.train.data import find_source
from adarankgrad.train.flops import TrainingFlops
from adarankgrad.train.tokenizer import train_tokenizer
from adarankgrad.train.tokens import encode
from small_schedules.study import Result, Run

SEQ_LEN, VOCAB_SIZE, HIDDEN, EVALUATION_BLOCKS = 64, 512, 64, 128

Blocks = dict[str, Tensor]  # (num_blocks, SEQ_LEN) of "train" and "validation"


class Plain:
    """Training without a schedule, and what a schedule may change.

    Args:
        run: The run's settings.
        model: What is trained.
        optimizer: Of its weights.

    Attributes:
        num_micro_batches: Backward passes in a step.
        depth: What sets the depth of a step, or None.
    """

    depth: Any = None

    def __init__(self, run: Run, model: nn.Module, optimizer: Optimizer) -> None:
        self.num_micro_batches: int = run["num_micro_batches"]

    def begin_step(self, step: int) -> None:
        """Prepare a step."""

    def passes(self) -> AbstractContextManager[Any]:
        """Wrap all forward and backward passes of a step."""
        return nullcontext()

    def end_step(self, num_samples: int) -> None:
        """Read the step's gradient, before it is clipped."""


def load_blocks(data: Path, folder: Path) -> Blocks:
    """Train a tokenizer and encode the novels, once; return blocks of tokens."""
    path = folder / f"tokens-{VOCAB_SIZE}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(_streams(data / "novels"), path)
    streams = torch.load(path, weights_only=True)
    return {
        name: stream[: len(stream) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
        for name, stream in streams.items()
    }


def train(run: Run, blocks: Blocks, method_class: type[Plain] = Plain) -> Result:
    """Train once, over as many samples as the run says.

    Warm-up over a tenth of the samples, cosine decay to a tenth, clipping at norm 1: the rate and
    the order of the data are functions of the samples seen, whatever the size of a batch.

    Returns:
        ``score``, the last validation loss; ``rows``, an evaluation each, with steps, samples and
        operations; ``cpu_s``.
    """
    start_s = time.process_time()
    model = make_model(run["layers"], run["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["lr"], weight_decay=0.0)
    for group in optimizer.param_groups:
        group["initial_lr"] = run["lr"]
    method = method_class(run, model, optimizer)
    flops = TrainingFlops(model, method.depth)
    samples = _ordered(blocks["train"], run["samples"], run["seed"])
    validation = blocks["validation"]
    held_out = validation[:: len(validation) // EVALUATION_BLOCKS][:EVALUATION_BLOCKS]
    interval = run["samples"] / run["evaluations"]
    seen = step = operations = 0
    rows: list[dict[str, Any]] = []
    while seen < run["samples"]:
        method.begin_step(step)
        batch_size = run["micro_batch"] * method.num_micro_batches
        batch = samples[seen : seen + batch_size]  # less at the end
        parts = batch.split(run["micro_batch"])
        seen, step = seen + len(batch), step + 1
        operations += flops.of(batch.numel(), SEQ_LEN) or 0
        for group in optimizer.param_groups:
            group["lr"] = run["lr"] * _factor(seen / run["samples"])
        with method.passes():
            for part in parts:
                loss = model(input_ids=part, labels=part).loss
                (loss * len(part) / len(batch)).backward()
        method.end_step(len(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if seen >= interval * (len(rows) + 1) or seen == run["samples"]:
            row = {"step": step, "samples": seen, "flops": operations, "batch_size": batch_size}
            rows.append({**row, "val_loss": validation_loss(model, held_out)})
    cpu_s = time.process_time() - start_s
    return {"score": rows[-1]["val_loss"], "rows": rows, "cpu_s": cpu_s}


def make_model(num_layers: int, seed: int) -> LlamaForCausalLM:
    """Build the model with the initial weights of a seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=172,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=SEQ_LEN,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def validation_loss(model: nn.Module, blocks: Tensor) -> float:
    """Mean loss in nats a token."""
    model.eval()
    losses = [model(input_ids=b.long(), labels=b.long()).loss.item() for b in blocks.split(64)]
    model.train()
    return sum(losses) / len(losses)


def _factor(progress: float) -> float:
    """Learning rate as a share of the highest."""
    if progress <= 0.1:
        return progress / 0.1
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def _ordered(blocks: Tensor, num_samples: int, seed: int) -> Tensor:
    """Samples in an order that the seed decides, none of them twice."""
    if num_samples > len(blocks):
        raise ValueError(f"{num_samples} samples are more than the {len(blocks)} of the text")
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return blocks[order[:num_samples]].long()


def _streams(novels: Path) -> dict[str, Tensor]:
    if not glob(str(novels / "*.txt")):
        raise SystemExit(f"{novels} has no novels: name the folder that holds novels/ with --data")
    sources = {
        "train": find_source(str(novels / "*.txt"), "text", 0),
        "validation": find_source(str(novels / "validation" / "*.txt"), "text", 0),
    }
    pieces = (piece.text for piece in sources["train"].pieces())
    tokenizer = train_tokenizer(pieces, VOCAB_SIZE, SEQ_LEN)
    return {
        name: torch.from_numpy(encode(source, tokenizer).astype("int32"))
        for name, source in sources.items()
    }
