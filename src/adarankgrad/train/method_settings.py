"""From the table of a method's settings, such as ``--powerprop alpha=2``, to its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from adarankgrad.train.errors import UserError, unknown_name

_Config = TypeVar("_Config")


def read_method(
    config_class: type[_Config],
    given: Mapping[str, Any] | None,
    flag: str,
    *,
    needs: str,
    advice: str,
) -> _Config | None:
    """Return a method's configuration, or None where nothing is given.

    Args:
        config_class: A dataclass that checks its values.
        given: Values by name.
        flag: That they are given by.
        needs: The name that must be among them.
        advice: What to give it, with an example, where it is missing.

    Raises:
        UserError: A setting is unknown, missing or out of range.
    """
    if not given:
        return None
    names = [spec.name for spec in fields(config_class)]  # type: ignore[arg-type]
    for name in given:
        if name not in names:
            raise unknown_name(f"setting of {flag}", name, names)
    if needs not in given:
        raise UserError(f"{flag} has no {needs}: give {advice}.")
    with errors_of(flag):
        return config_class(**given)


@contextmanager
def errors_of(flag: str) -> Iterator[None]:
    """Name the flag in what is refused within this context.

    Raises:
        UserError: For a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{flag}: {error}.") from error
