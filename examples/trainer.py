"""Fine-tune every weight of a language model on a text, with transformers' Trainer.

python examples/trainer.py HuggingFaceTB/SmolLM2-135M book.txt runs/book
torchrun --nproc-per-node 2 examples/trainer.py HuggingFaceTB/SmolLM2-135M book.txt runs/book
"""

from __future__ import annotations

import sys

from text_blocks import text_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from adarankgrad.integrations.transformers import AdaRankGradFactory, log_subspaces

model_name, text, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
args = TrainingArguments(
    output_dir=output,
    num_train_epochs=1,
    per_device_train_batch_size=8,
    learning_rate=2e-4,
    weight_decay=0.01,
    lr_scheduler_type="cosine",
    logging_steps=1,
    report_to="tensorboard",
)
trainer = Trainer(
    AutoModelForCausalLM.from_pretrained(model_name),
    args,
    train_dataset=text_blocks(tokenizer, text),
    processing_class=tokenizer,
    optimizer_cls_and_kwargs=(AdaRankGradFactory, {"training_args": args, "max_rank": 128}),
)
log_subspaces(trainer)
trainer.train()
trainer.save_model()
