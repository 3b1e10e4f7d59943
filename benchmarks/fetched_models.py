"""What the models of `adarankgrad fetch-model` can do after their conversion.

    adarankgrad fetch-model smollm2 --output models/smollm2   # and minilm, antiberty
    python benchmarks/fetched_models.py --models models --data ../shared/data

SmolLM2: loss in nats a token on the first 64 blocks of 512 tokens of an English novel. MiniLM:
Spearman's correlation of cosine similarities with the scores of STS-B's development set. AntiBERTy:
how often the likeliest residue is the masked one, on 500 heavy chains of which 15 % is masked,
inside the CDRH3 loop and outside, beside always naming the most common residue. Nine minutes on
two busy cores; a check of conversions, not of models.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path
from typing import Any

import pandas
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from adarankgrad.train.quiet import quiet_transformers
from harness import finish, print_table

BEFORE_LOOP = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQ"
    "MNSLRAEDTAVYYCSR"
)
AFTER_LOOP = "YWGQGTLVTVSS"
SHARE_MASKED = 0.15


def main() -> None:
    """Measure the three models, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    quiet_transformers()
    with torch.no_grad():
        result = {
            "smollm2": novel_loss(arguments.models / "smollm2", arguments.data / "novels"),
            "minilm": similarity(arguments.models / "minilm", arguments.data / "glue" / "STS-B"),
            "antiberty": masked(arguments.models / "antiberty", arguments.data / "antibody"),
        }
    rows = [
        (model, name, f"{value:.4g}")
        for model, values in result.items()
        for name, value in values.items()
    ]
    print_table(("model", "measured", "value"), rows)
    finish("fetched_models", result)


def novel_loss(folder: Path, novels: Path) -> dict[str, float]:
    """Loss of the causal language model on a novel, in nats a token."""
    model, tokenizer = load(AutoModelForCausalLM, folder)
    text = sorted((novels / "validation").glob("*.txt"))[0].read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    blocks = ids[: 64 * 512].view(-1, 512)
    losses = [float(model(input_ids=block, labels=block).loss) for block in blocks.split(4)]
    return {"loss": sum(losses) / len(losses), "num_tokens": blocks.numel()}


def similarity(folder: Path, sts_b: Path) -> dict[str, float]:
    """Rank correlation of the encoder's similarities with people's, over pairs of sentences."""
    model, tokenizer = load(AutoModel, folder)
    table = pandas.read_csv(sts_b / "dev.tsv", sep="\t", quoting=csv.QUOTE_NONE, encoding="utf-8")
    cosines = []
    for start in range(0, len(table), 50):
        rows = table[start : start + 50]
        first, second = (
            embed(model, tokenizer, rows[column]) for column in ("sentence1", "sentence2")
        )
        cosines += (first * second).sum(1).tolist()
    ranks = pandas.Series(cosines).rank()
    return {"spearman": float(ranks.corr(table["score"].rank())), "num_pairs": len(table)}


def embed(model: Any, tokenizer: Any, sentences: Any) -> torch.Tensor:
    """Mean of the last hidden states over each sentence's tokens, of length 1: (n, hidden)."""
    batch = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    is_token = batch.attention_mask[..., None]
    hidden = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * is_token).sum(1) / is_token.sum(1))


def masked(folder: Path, antibody: Path) -> dict[str, float]:
    """How often a masked residue is named, in the CDRH3 loop and elsewhere."""
    model, tokenizer = load(AutoModelForMaskedLM, folder)
    loops = random.Random(0).sample(binders(antibody), 500)
    chains = [BEFORE_LOOP + loop + AFTER_LOOP for loop in loops]
    ids = tokenizer(chains, return_tensors="pt").input_ids
    is_masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < SHARE_MASKED
    is_masked[:, 0] = is_masked[:, -1] = False
    in_loop = torch.zeros_like(is_masked)
    in_loop[:, 1 + len(BEFORE_LOOP) : -1 - len(AFTER_LOOP)] = True
    named = []
    for rows in torch.where(is_masked, tokenizer.mask_token_id, ids).split(50):
        logits = model(input_ids=rows).logits
        logits[..., tokenizer.all_special_ids] = -torch.inf
        named.append(logits.argmax(-1))
    is_right = torch.cat(named) == ids
    most_common = ids[:, 1:-1].flatten().mode().values
    return {
        "accuracy": share(is_right[is_masked]),
        "accuracy_in_loop": share(is_right[is_masked & in_loop]),
        "accuracy_outside": share(is_right[is_masked & ~in_loop]),
        "most_common_residue": share(ids[is_masked] == most_common),
        "num_masked": int(is_masked.sum()),
    }


def binders(antibody: Path) -> list[str]:
    """Loops that stand among the binders and not among the others, sorted."""
    return sorted(loops(antibody, "AgPos") - loops(antibody, "AgNeg"))


def loops(antibody: Path, kind: str) -> set[str]:
    """Every loop of one of the two files, ``AgPos`` or ``AgNeg``."""
    return set(pandas.read_csv(antibody / f"mHER_H3_{kind}.csv")["AASeq"])


def share(values: torch.Tensor) -> float:
    """Share that is true."""
    return float(values.float().mean())


def load(kind: Any, folder: Path) -> tuple[Any, Any]:
    """Model in evaluation mode, and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return kind.from_pretrained(folder, local_files_only=True).eval(), tokenizer


if __name__ == "__main__":
    main()
