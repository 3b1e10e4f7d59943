"""How values of settings are written as text: ``name=value,...``, ranks, TOML.

Nothing here imports torch: ``adarankgrad --help`` stays fast.
"""

from __future__ import annotations

import ast
import json
import keyword
import math
import re
import sys
from pathlib import Path
from typing import Any

from adarankgrad.train.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml_table(path: Path) -> dict[str, Any]:
    """Read a TOML file without looking at its keys.

    Raises:
        UserError: The file is missing or not TOML.
    """
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"the config {path} is not valid TOML: {error}.") from error


def parse_arguments(
    text: str, flag: str = "--optimizer-args", example: str = "betas=(0.9,0.95),eps=1e-6"
) -> dict[str, Any]:
    """Parse ``name=value,...``; values are Python literals or inf, other bare words are text.

    Args:
        text: What was given.
        flag: What it was given to, for the message.
        example: Of such a value, for the message.

    Example:
        >>> parse_arguments("betas=(0.9, 0.95),carry=squared")
        {'betas': (0.9, 0.95), 'carry': 'squared'}

    Raises:
        UserError: The text has another form, or a name twice.
    """
    try:
        call = ast.parse(f"dict({_KEYWORD_VALUE.sub(_quoted, text)})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        pairs = [(_argument_name(word), _literal(word.value)) for word in call.keywords]
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{flag} {text!r} cannot be read: write name=value,name=value with Python literals, "
            f"such as {example}."
        ) from error
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{flag} {text!r} has {name} more than once: leave one.")
    return dict(pairs)


def format_arguments(arguments: dict[str, Any]) -> str:
    """Return the text that `parse_arguments` reads back."""
    return ",".join(f"{name}={value!r}" for name, value in arguments.items())


def parse_rank(text: str) -> int | float:
    """Read ``64`` as columns and ``0.25`` as a share of the short side."""
    try:
        return int(text)
    except ValueError:
        return float(text)


# Words such as per-sample and raise, which Python would not read as a value.
_HYPHENATED = r"[A-Za-z_]\w*(?:-\w+)+"
_WORDS = "|".join([_HYPHENATED, *sorted(set(keyword.kwlist) - {"True", "False", "None"})])
_KEYWORD_VALUE = re.compile(rf"=\s*({_WORDS})\s*(?=,|$)")


def _quoted(match: re.Match[str]) -> str:
    return f"={match[1]!r}"


def _argument_name(word: ast.keyword) -> str:
    if word.arg is None:
        raise ValueError
    return word.arg


def _literal(node: ast.expr) -> Any:
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    return math.inf if node.id == "inf" else node.id


def toml_value(value: Any) -> str:
    """Return a text, number, truth value or list of them as TOML."""
    # JSON's strings are TOML's, but for DEL, which TOML wants escaped.
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)
