"""What can end a run early: a request that cannot be met, a failure, or a person stopping it."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can fix; shown as one line on stderr, exit code 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (disk full, no memory left); one line on stderr, exit code 1."""


class DivergedError(TrainingError):
    """The loss or a weight is not finite any more; one line on stderr, exit code 3."""


class Interrupted(Exception):  # noqa: N818 - a request that was met, not an error
    """Training stopped on a signal after saving a checkpoint.

    Attributes:
        exit_code: 128 + the signal's number, as shells expect: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unknown_name(kind: str, name: str, allowed: list[str], *, hint: str = "") -> UserError:
    """Return the error for a name that is not in a list, with its closest matches.

    Args:
        kind: What the name is of, such as ``"optimizer"``.
        name: The name as given.
        allowed: Every accepted name.
        hint: What else would be accepted, appended to the message.
    """
    import difflib

    close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    return UserError(f"unknown {kind} {name!r}: {guess}Allowed: {', '.join(allowed)}{hint}.")
