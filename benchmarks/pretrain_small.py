"""Validation loss and optimizer state of AdaRankGrad and AdamW on a small LLaMA and real text.

    python benchmarks/pretrain_small.py --data '../shared/data/novels/*.txt' \
        --validation '../shared/data/novels/validation/*.txt'

The model has hidden size 128, 4 layers, a vocabulary of 4096 and 1.8M parameters. At a seed, every
optimizer gets the same initial weights and the same batches. Embeddings, head and norms are trained
by AdamW in every run. Their learning rate and that of the projected weights are chosen from the
same grid of pairs (``--plain-lrs`` by ``--lrs``) for each optimizer, on the first seed, and used on
the others. Warmup over a tenth of the steps, cosine decay to a tenth, clipping at norm 1.

Bytes are of the projected weights' state, averaged over the run and at its highest, as shares of
AdamW's. Finished runs are kept in ``--cells`` with a digest of the optimizer's code and of the
tokens, and repeated when either changes. After a change of this file, name another folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adarankgrad
from adarankgrad import AdaRankGrad, param_groups
from adarankgrad.optim.engine import SubspaceOptimizer
from adarankgrad.train.data import find_source
from adarankgrad.train.tokenizer import train_tokenizer
from adarankgrad.train.tokens import encode
from harness import environment, finish, median, print_table, spread

SEQ_LEN, VOCAB_SIZE, EVALUATION_BLOCKS = 128, 4096, 512


def adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Torch's AdamW on every parameter, with the learning rate of its group."""
    return torch.optim.AdamW(
        [{"params": [p for _, p in group["params"]], "lr": group["lr"]} for group in groups],
        **{"weight_decay": 0.0, **options},
    )


def published(groups: list[dict[str, Any]], **options: Any) -> AdaRankGrad:
    """AdaRankGrad as published, at the ceiling that is our default here."""
    return AdaRankGrad.published(groups, **{"max_rank": 32, **options})


def without_residual(groups: list[dict[str, Any]], **options: Any) -> AdaRankGrad:
    """Our choices but for the residual, at the energy that suits them then."""
    return AdaRankGrad(groups, **{"residual": "none", "energy": 0.9, **options})


OPTIMIZERS = {
    "adamw": adamw,
    "adarankgrad": AdaRankGrad,
    "adarankgrad, no residual": without_residual,
    "adarankgrad, as published": published,
}


def make_model(seed: int) -> LlamaForCausalLM:
    """Build the model with the initial weights of a seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=SEQ_LEN,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def prepare_tokens(data: str, validation: str, path: Path) -> None:
    """Train the tokenizer on the training text and save both token streams."""
    train_source = find_source(data, "text", 0)
    tokenizer = train_tokenizer(
        (piece.text for piece in train_source.pieces()), VOCAB_SIZE, SEQ_LEN
    )
    sources = {"train": train_source, "validation": find_source(validation, "text", 0)}
    streams = {
        name: torch.from_numpy(encode(source, tokenizer).astype("int32"))
        for name, source in sources.items()
    }
    torch.save(streams, path)


@lru_cache
def load_blocks(path: Path) -> dict[str, torch.Tensor]:
    """Token streams cut into (num_blocks, SEQ_LEN)."""
    streams = torch.load(path, weights_only=True)
    return {
        name: stream[: len(stream) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
        for name, stream in streams.items()
    }


def batches(blocks: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches in an order that only the seed decides, pass after pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(blocks), generator=generator).split(batch_size):
            if len(rows) == batch_size:
                yield blocks[rows].long()


def lr_factor(step: int, num_steps: int) -> float:
    """Linear warmup over a tenth of the steps, cosine decay to a tenth."""
    warmup = num_steps / 10
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (num_steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train once and return what is reported of it."""
    torch.set_num_threads(cell["num_threads"])
    blocks = load_blocks(Path(cell["tokens"]))
    model = make_model(cell["seed"])
    groups = param_groups(model)
    for group in groups:
        group["lr"] = cell["lr"] if group["project"] else cell["plain_lr"]
    projected = [p for group in groups if group["project"] for _, p in group["params"]]
    optimizer = OPTIMIZERS[cell["optimizer"]](groups, **cell["options"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, cell["steps"])
    )
    ranks, shares, optimizer_s = [], [], 0.0
    stream = batches(blocks["train"], cell["batch_size"], cell["seed"])
    for _ in range(cell["steps"]):
        batch = next(stream)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        start = time.perf_counter()
        optimizer.step()
        optimizer_s += time.perf_counter() - start
        schedule.step()
        optimizer.zero_grad()
        if isinstance(optimizer, SubspaceOptimizer):
            report = optimizer.report()
            ranks.append(report.mean_rank)
            shares.append(report.projected_state_bytes / report.adamw_projected_state_bytes)
    return {
        **{key: value for key, value in cell.items() if key not in _NOT_STORED},
        "val_loss": validation_loss(model, blocks["validation"][:EVALUATION_BLOCKS]),
        "adamw_projected_state_bytes": sum(8 * p.numel() for p in projected),
        "mean_state_share": sum(shares) / len(shares) if shares else 1.0,
        "highest_state_share": max(shares, default=1.0),
        "ranks": [round(rank, 2) for rank in ranks[:: max(1, cell["steps"] // 40)]],
        "optimizer_s_per_step": optimizer_s / cell["steps"],
    }


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, blocks: torch.Tensor) -> float:
    """Mean loss in nats a token over the blocks."""
    model.eval()
    losses = [model(input_ids=b.long(), labels=b.long()).loss.item() for b in blocks.split(32)]
    return sum(losses) / len(losses)


def run_cells(cells: list[dict[str, Any]], store: Path, workers: int) -> list[dict[str, Any]]:
    """Run the cells that the store does not hold yet; return the results of all."""
    commit = environment()["commit"]
    cells = [{**cell, "code": _code_digest(cell["optimizer"]), "commit": commit} for cell in cells]
    known = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    done = {_key(result): result for result in known if set(_IDENTITY) <= set(result)}
    missing = [cell for cell in cells if _key(cell) not in done]
    with ProcessPoolExecutor(workers) as pool:
        for result in pool.map(run_cell, missing):
            done[_key(result)] = result
            with store.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            print(f"{_label(result)}: {result['val_loss']:.4f}", flush=True)
    return [done[_key(cell)] for cell in cells]


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one optimizer at its chosen rate over seeds."""
    losses = [result["val_loss"] for result in results]
    return {
        "lr": results[0]["lr"],
        "plain_lr": results[0]["plain_lr"],
        "val_loss": {"median": median(losses), "spread": spread(losses), "seeds": losses},
        "adamw_projected_state_bytes": results[0]["adamw_projected_state_bytes"],
        "mean_state_share": median([result["mean_state_share"] for result in results]),
        "highest_state_share": max(result["highest_state_share"] for result in results),
        "optimizer_ms_per_step": 1e3 * median([r["optimizer_s_per_step"] for r in results]),
        "ranks_of_first_seed": results[0]["ranks"],
    }


def main() -> None:
    """Choose rates on the first seed, run the others, print a table, write the result."""
    arguments = parse_arguments()
    common = common_settings(arguments)
    first, *others = arguments.seeds
    store = arguments.cells / "cells.jsonl"

    grid = run_cells(
        [
            {**common, "optimizer": name, "options": {}, "seed": first, "lr": lr, "plain_lr": plain}
            for name in arguments.optimizers
            for plain in arguments.plain_lrs
            for lr in arguments.lrs
        ],
        store,
        arguments.workers,
    )
    best = {
        name: min((r for r in grid if r["optimizer"] == name), key=lambda r: r["val_loss"])
        for name in arguments.optimizers
    }
    rates = {name: {key: run[key] for key in ("lr", "plain_lr")} for name, run in best.items()}
    repeats = run_cells(
        [
            {**common, "optimizer": name, "options": {}, "seed": seed, **rates[name]}
            for name in arguments.optimizers
            for seed in others
        ],
        store,
        arguments.workers,
    )
    summary = {
        name: summarize([run, *(r for r in repeats if r["optimizer"] == name)])
        for name, run in best.items()
    }
    print_summary(summary)
    finish(
        "pretrain_small",
        {
            **{key: getattr(arguments, key) for key in ("steps", "batch_size", "lrs", "plain_lrs")},
            "seq_len": SEQ_LEN,
            "seeds": arguments.seeds,
            "data": arguments.data,
            "validation": arguments.validation,
            "commits_of_runs": sorted({result["commit"] for result in grid + repeats}),
            "grid": [{key: r[key] for key in _GRID_COLUMNS} for r in grid],
            "optimizers": summary,
        },
    )


def print_summary(summary: dict[str, Any]) -> None:
    """Print one row an optimizer."""
    rows = []
    for name, figures in summary.items():
        low, high = figures["val_loss"]["spread"]
        loss = f"{figures['val_loss']['median']:.4f} [{low:.4f}, {high:.4f}]"
        shares = (figures["mean_state_share"], figures["highest_state_share"])
        ranks = figures["ranks_of_first_seed"]
        rank = f"{sum(ranks) / len(ranks):.1f}" if ranks else "-"
        milliseconds = f"{figures['optimizer_ms_per_step']:.1f}"
        rates = (figures["lr"], figures["plain_lr"])
        rows.append([name, *rates, loss, *(f"{s:.3f}" for s in shares), rank, milliseconds])
    losses = "val loss, median [spread]"
    print_table(["optimizer", "lr", "plain", losses, "state", "highest", "rank", "ms/step"], rows)


def common_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the tokens if they are not there, and return what all runs share."""
    arguments.cells.mkdir(parents=True, exist_ok=True)
    tokens = arguments.cells / f"tokens-{_text_digest(arguments.data, arguments.validation)}.pt"
    if not tokens.exists():
        prepare_tokens(arguments.data, arguments.validation, tokens)
    return {
        "tokens": str(tokens),
        "tokens_digest": hashlib.sha256(tokens.read_bytes()).hexdigest()[:16],
        "num_threads": max(1, torch.get_num_threads() // arguments.workers),
        **{key: getattr(arguments, key) for key in ("steps", "batch_size")},
    }


def base_parser(description: str) -> argparse.ArgumentParser:
    """The options that benchmarks on this model share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default="../shared/data/novels/*.txt")
    parser.add_argument("--validation", default="../shared/data/novels/validation/*.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("runs/pretrain_small"))
    return parser


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = base_parser(__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--plain-lrs", type=float, nargs="+", default=[8e-3, 16e-3])
    return parser.parse_args()


# What does not change a result, or is not worth keeping.
_NOT_STORED = ("tokens", "num_threads")
_GRID_COLUMNS = ("optimizer", "lr", "plain_lr", "val_loss")
_IDENTITY = (
    *("optimizer", "options", "lr", "plain_lr", "steps", "batch_size", "seed"),
    *("tokens_digest", "code"),
)


def _text_digest(*patterns: str) -> str:
    """Identify texts by name and size, so that other texts get other tokens."""
    files = [(path, Path(path).stat().st_size) for p in patterns for path in sorted(glob(p))]
    return hashlib.sha256(repr((patterns, files)).encode()).hexdigest()[:8]


def _key(cell: dict[str, Any]) -> str:
    return json.dumps([cell[name] for name in _IDENTITY])


def _label(cell: dict[str, Any]) -> str:
    rates = f"lr={cell['lr']} plain={cell['plain_lr']}"
    return f"{cell['optimizer']} {cell['options'] or ''} {rates} seed={cell['seed']}"


def _code_digest(optimizer: str) -> str:
    """Identify the code that decides a run: ours, or torch's."""
    if optimizer == "adamw":
        return torch.__version__
    package = Path(adarankgrad.__file__).parent
    sources = sorted([*package.glob("core/*.py"), *package.glob("optim/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


if __name__ == "__main__":
    main()
