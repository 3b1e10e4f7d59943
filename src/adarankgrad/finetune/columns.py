"""Which column holds what: found by name, shown, and overridden by settings."""

from __future__ import annotations

from adarankgrad.finetune.table import Table
from adarankgrad.train.errors import UserError

# In order of preference; upper and lower case are the same.
TEXT_NAMES = ("text", "sentence", "sequence", "content", "review", "document")
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("#1 string", "#2 string"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
LABEL_NAMES = ("label", "labels", "score", "target", "class", "quality", "is_duplicate")
ANSWER_NAMES = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
)
CHAT_NAMES = ("messages", "conversation")

Columns = dict[str, str]
"""From a role, such as ``text`` or ``label``, to the name of the column."""


def find_text(table: Table, given: str | None) -> Columns:
    """Find the column of the text."""
    return {"text": given_column(table, given, "text") or _one_of(table, TEXT_NAMES, "text")}


def find_pair(table: Table, text: str | None, pair: str | None) -> Columns | None:
    """Find the columns of two texts; None where there are none, and none are named.

    Raises:
        UserError: Only one of the two is named, or it is missing.
    """
    if text is None and pair is None:
        found = _first_pair(table, PAIR_NAMES)
        return found and {"text": found[0], "pair": found[1]}
    if text is None or pair is None:
        missing = "text" if text is None else "pair"
        raise UserError(f"a pair has two columns: name the other with --{missing}-column.")
    first, second = given_column(table, text, "text"), given_column(table, pair, "pair")
    assert first is not None and second is not None
    return {"text": first, "pair": second}


def find_label(table: Table, given: str | None) -> Columns:
    """Find the column of the label."""
    return {"label": given_column(table, given, "label") or _one_of(table, LABEL_NAMES, "label")}


def find_answer(table: Table, prompt: str | None, completion: str | None) -> Columns | None:
    """Find the columns of what is asked and answered; None where there are none."""
    if prompt is None and completion is None:
        found = _first_pair(table, ANSWER_NAMES)
        return found and {"prompt": found[0], "completion": found[1]}
    if prompt is None or completion is None:
        missing = "prompt" if prompt is None else "completion"
        raise UserError(f"an example has two columns: name the other with --{missing}-column.")
    first = given_column(table, prompt, "prompt")
    second = given_column(table, completion, "completion")
    assert first is not None and second is not None
    return {"prompt": first, "completion": second}


def find_chat(table: Table, given: str | None) -> Columns | None:
    """Find the column of a chat; None where there is none."""
    name = given_column(table, given, "messages") or _first(table, CHAT_NAMES)
    return None if name is None else {"messages": name}


def given_column(table: Table, given: str | None, role: str) -> str | None:
    """Return the column that a setting names, if it does.

    Raises:
        UserError: There is no such column.
    """
    if given is None or given in table.columns:
        return given
    raise UserError(f"{table.name} has no column {given!r}: {_advice(table, role)}")


def show(columns: Columns) -> str:
    """Return what is read from where, in one line."""
    listed = ", ".join(f"{role} from {name!r}" for role, name in columns.items())
    return f"reading {listed}"


def no_columns(table: Table, role: str) -> UserError:
    """Return the error for data in which no column has a name that is known."""
    return UserError(f"{table.name} has no column known to hold the {role}: {_advice(table, role)}")


def _one_of(table: Table, names: tuple[str, ...], role: str) -> str:
    found = [name for name in names if _first(table, (name,))]
    if len(found) > 1:
        raise UserError(
            f"{table.name} has more than one column that could hold the {role} "
            f"({', '.join(found)}): name one with --{role}-column."
        )
    name = _first(table, names)
    if name is None:
        raise no_columns(table, role)
    return name


def _first(table: Table, names: tuple[str, ...]) -> str | None:
    present = {name.lower(): name for name in table.columns}
    return next((present[name] for name in names if name in present), None)


def _first_pair(table: Table, pairs: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    for first, second in pairs:
        found = _first(table, (first,)), _first(table, (second,))
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None


def _advice(table: Table, role: str) -> str:
    return f"name one of {', '.join(table.columns)} with --{role}-column."
