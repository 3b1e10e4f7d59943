"""Train a LoRA adapter's weights by AdaRankGrad, whose state is smaller still than AdamW's on them.

python examples/peft_lora.py HuggingFaceTB/SmolLM2-135M book.txt runs/adapter
"""

from __future__ import annotations

import sys

from peft import LoraConfig, get_peft_model
from text_blocks import text_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from adarankgrad.integrations.transformers import AdaRankGradFactory

model_name, text, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_name), config)
args = TrainingArguments(
    output_dir=output,
    num_train_epochs=1,
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    report_to="none",
)
trainer = Trainer(
    model,
    args,
    train_dataset=text_blocks(tokenizer, text),
    optimizer_cls_and_kwargs=(AdaRankGradFactory, {"training_args": args}),
)
trainer.train()
trainer.save_model()
