"""Fine-tune a language model on a text, in a loop of your own with accelerate.

python examples/accelerate_loop.py HuggingFaceTB/SmolLM2-135M book.txt runs/book
"""

from __future__ import annotations

import math
import sys

from accelerate import Accelerator
from text_blocks import text_blocks
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from adarankgrad import AdaRankGrad, param_groups

model_name, text, output = sys.argv[1:]
accelerator = Accelerator(gradient_accumulation_steps=2)
model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)
batches = DataLoader(text_blocks(tokenizer, text), batch_size=4, shuffle=True)
optimizer = AdaRankGrad(param_groups(model, weight_decay=0.01), lr=2e-4)
num_steps = math.ceil(len(batches) / accelerator.gradient_accumulation_steps)
schedule = get_cosine_schedule_with_warmup(optimizer, 0, num_steps)
model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)

for batch in batches:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

accelerator.print(optimizer.optimizer.report())
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(output)
    tokenizer.save_pretrained(output)
