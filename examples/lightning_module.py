"""Fine-tune a language model on a text, with Lightning.

python examples/lightning_module.py HuggingFaceTB/SmolLM2-135M book.txt runs/book
"""

from __future__ import annotations

import sys

import lightning
from text_blocks import text_blocks
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from adarankgrad import AdaRankGrad, param_groups


class LanguageModel(lightning.LightningModule):
    """A causal language model that is trained by AdaRankGrad."""

    def __init__(self, name):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name)

    def training_step(self, batch, index):
        """Return the loss of a batch."""
        return self.model(**batch).loss

    def configure_optimizers(self):
        """Build the optimizer; Lightning may be given a schedule beside it as for any other."""
        return AdaRankGrad(param_groups(self.model, weight_decay=0.01), lr=2e-4)


model_name, text, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
batches = DataLoader(text_blocks(tokenizer, text), batch_size=8, shuffle=True)
module = LanguageModel(model_name).train()
trainer = lightning.Trainer(
    max_epochs=1, gradient_clip_val=1.0, default_root_dir=output, logger=False, devices=1
)
trainer.fit(module, batches)
module.model.save_pretrained(output)
tokenizer.save_pretrained(output)
