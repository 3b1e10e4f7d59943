"""transformers and peft without their own messages, where ours say what matters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and every message but errors, in this process."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """Leave out what peft makes transformers warn of, and no user can change."""
    with warnings.catch_warnings():
        # peft asks by the old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
