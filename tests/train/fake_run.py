"""Builds run folders like those that training leaves behind, in milliseconds."""

import json
import math
from pathlib import Path

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTED_ADAMW_BYTES = 6_291_456


def write_fake_run(
    folder: Path, optimizer: str = "adarankgrad", num_logs: int = 12, num_blocks: int = 2, **summary
) -> Path:
    """Write a finished run of ``num_logs`` logged steps and ``num_blocks`` transformer blocks."""
    folder.mkdir(parents=True)
    adaptive = optimizer == "adarankgrad"
    steps = [10 * (i + 1) for i in range(num_logs)]
    _write_lines(folder / "metrics.jsonl", _metrics(steps, adaptive))
    if adaptive:
        _write_lines(folder / "ranks.jsonl", [_ranks(step, num_blocks) for step in steps])
    (folder / "config.toml").write_text(
        f'optimizer = "{optimizer}"\nsteps = {steps[-1]}\nlr = 0.001\ndata = ["data/train.jsonl"]\n'
        "[optimizer_args]\nenergy = 0.9\n"
    )
    info = {
        "command": ["adarankgrad", "train", "--optimizer", optimizer, "--data", "a $b <c>.txt"],
        "versions": {"adarankgrad": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "commit": None,
        "device": "cpu",
        "dtype": "float32",
        "model_parameters": 1_840_000,
        "created": "2026-01-01T12:00:00+00:00",
        "describe": "what        rank ceiling\nq_proj      32\n",
    }
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "summary.json").write_text(json.dumps(_summary(optimizer, steps, adaptive) | summary))
    return folder


def write_counted_run(folder: Path, *, per_token: int, is_growing: bool, **summary) -> Path:
    """Write a finished run with operations, all at one cost a token."""
    run_dir = write_fake_run(folder, "adamw", num_logs=8, **summary)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"training_flops": row["tokens"] * per_token}) for row in rows]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    if is_growing:
        with (run_dir / "config.toml").open("a") as file:
            file.write("[progressive_depth]\nlayers = [1, 4]\nstarts = [0, 20]\n")
    return run_dir


def _loss(step: int) -> float:
    return 3.2 + 5.1 * math.exp(-step / 40) + 0.05 * math.sin(step)


def _mean_rank(step: int) -> float:
    return 6 + 20 * math.exp(-step / 60)


def _metrics(steps: list[int], adaptive: bool) -> list[dict]:
    rows = []
    for step in steps:
        tokens = step * 2048
        rows.append(
            {
                "step": step,
                "tokens": tokens,
                "loss": _loss(step),
                "lr": 1e-3,
                "tokens_per_second": 9000.0,
                "elapsed_s": step * 0.2,
                "grad_norm": 0.9,
                "mean_rank": _mean_rank(step) if adaptive else None,
                "state_bytes": 5_000_000 if adaptive else 14_700_000,
            }
        )
        if step % 40 == 0 or step == steps[-1]:
            val_loss = _loss(step) + 0.1
            rows.append(
                {
                    "step": step,
                    "tokens": tokens,
                    "val_loss": val_loss,
                    "perplexity": math.exp(val_loss),
                }
            )
    return rows


def _ranks(step: int, num_blocks: int) -> dict:
    layers = []
    for block in range(num_blocks):
        for index, name in enumerate(PROJECTIONS):
            part = "self_attn" if index < 4 else "mlp"
            layers.append(
                {
                    "name": f"model.layers.{block}.{part}.{name}.weight",
                    "shape": [128, 128],
                    "rank": min(32, max(2, round(_mean_rank(step) + 3 * math.sin(index + block)))),
                    "max_rank": 32,
                    "captured_energy": 0.88 + 0.01 * index,
                    "steps_since_refresh": step % 20,
                    "refresh_reason": "max_gap" if index else "norm",
                    "num_refreshes": 1 + step // 20,
                    "num_skipped_refreshes": 0,
                }
            )
    return {"step": step, "layers": layers}


def _summary(optimizer: str, steps: list[int], adaptive: bool) -> dict:
    projected = 860_000 if adaptive else PROJECTED_ADAMW_BYTES
    val_loss = _loss(steps[-1]) + 0.1
    return {
        "optimizer": optimizer,
        "steps": steps[-1],
        "tokens": steps[-1] * 2048,
        "train_loss": _loss(steps[-1]),
        "val_loss": val_loss,
        "perplexity": math.exp(val_loss),
        "state_bytes": projected + 8_400_000,
        "projected_state_bytes": projected,
        "adamw_projected_state_bytes": PROJECTED_ADAMW_BYTES,
        "weight_bytes": 7_360_000,
        "gradient_bytes": 7_360_000,
        "peak_bytes": 812_000_000,
        "peak_bytes_source": "process resident set",
        "mean_rank": _mean_rank(steps[-1]) if adaptive else None,
        "training_flops": None,
        "skipped_steps": 0 if adaptive else None,
        "tokens_per_second": 9000.0,
        "optimizer_s": 3.2,
        "elapsed_s": steps[-1] * 0.2,
        "paths": {
            "model": "model",
            "report": "report.html",
            "metrics": "metrics.jsonl",
            "plots": "plots",
        },
    }


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
