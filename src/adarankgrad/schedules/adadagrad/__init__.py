"""AdAdaGrad (Lau et al. 2024, arXiv 2402.11215): the batch grows as its gradient gets noisy.

`docs/adadagrad.md` says what of it was read, run and remembered.
"""

from .controller import AdAdaGradConfig, BatchSizeController
from .micro_batches import MicroBatchNorms
from .per_sample import per_sample_sums
from .sample_norms import SampleNorms

__all__ = [
    "AdAdaGradConfig",
    "BatchSizeController",
    "MicroBatchNorms",
    "SampleNorms",
    "per_sample_sums",
]
