"""A server that imports torch, transformers and peft once; other processes are forked from it.

It has run nothing and so holds no locks, which a fork of the test's own process would inherit with
no thread to release them.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch.utils.tensorboard",
        "torch.distributed.checkpoint",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
        "transformers.integrations.integration_utils",
        "adarankgrad.adapters.sora",
        "adarankgrad.finetune.run",
        "adarankgrad.train.plots",
        "adarankgrad.train.run",
        "adarankgrad.integrations.transformers",
    ]
)
