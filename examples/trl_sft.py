"""Fine-tune a language model on the lines of a text, with TRL's SFTTrainer.

python examples/trl_sft.py HuggingFaceTB/SmolLM2-135M lines.txt runs/lines
"""

from __future__ import annotations

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from adarankgrad.integrations.transformers import AdaRankGradFactory, log_subspaces

model_name, text, output = sys.argv[1:]
args = SFTConfig(
    output_dir=output,
    num_train_epochs=1,
    per_device_train_batch_size=8,
    max_length=128,
    learning_rate=2e-4,
    bf16=False,
    logging_steps=1,
    report_to="none",
)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(model_name),
    args,
    train_dataset=Dataset.from_text(text),
    processing_class=AutoTokenizer.from_pretrained(model_name),
    optimizer_cls_and_kwargs=(AdaRankGradFactory, {"training_args": args, "max_rank": 128}),
)
log_subspaces(trainer)
trainer.train()
trainer.save_model()
