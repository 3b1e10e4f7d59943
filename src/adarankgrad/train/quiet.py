"""transformers without its own messages, where ours say what matters."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and every message but errors, in this process."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
