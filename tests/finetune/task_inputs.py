"""Which model and data of the tiny ones each task takes."""

TASK_INPUTS = {
    "classification": ("bert", "{}.tsv"),
    "pair-classification": ("bert", "{}_pairs.tsv"),
    "regression": ("bert", "{}_scores.tsv"),
    "causal-lm": ("llama", "{}.csv"),
    "instruction": ("chat", "{}.jsonl"),
    "masked-lm": ("residues", "{}.csv"),
}
