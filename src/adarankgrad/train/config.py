"""The settings of a training run: one dataclass behind the flags, the TOML file and the API.

Each field carries its help text, so that the command line, the TOML keys and `TrainConfig` cannot
drift apart. Nothing here imports torch: ``adarankgrad --help`` stays fast.
"""

from __future__ import annotations

import ast
import json
import keyword
import math
import re
import sys
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from adarankgrad.train.errors import UserError, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("float32", "bfloat16", "mixed-bfloat16")
LR_SCHEDULES = ("cosine", "linear", "constant")


def _setting(help: str, default: Any = MISSING, *, kind: str = "str") -> Any:
    metadata = {"help": help, "kind": kind}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a training run.

    The help text of each field is in its metadata and printed by ``adarankgrad train --help``.
    Fields that default to None are chosen from the others when training starts (learning rate from
    the optimizer, vocabulary from the model, warm-up from the steps) or left to the optimizer.

    Example:
        >>> config = TrainConfig(data="corpus/", output="runs/first", steps=200)
        >>> config.optimizer
        'adarankgrad'
    """

    data: str = _setting(
        "Text to train on: a file, folder, glob, or a dataset's name on the hub (owner/name). "
        "Text, .jsonl, .json and .parquet."
    )
    output: str = _setting("Run folder to write.")
    validation: str | None = _setting(
        "Text to validate on. Default: the last 5 % of the data.", None
    )
    text_column: str = _setting("Column that holds the text in .jsonl, .json, .parquet.", "text")
    model: str = _setting(
        "A LLaMA size (small-llama, 9m, 20m, 35m, 60m, 71m, 130m, 250m, 350m, 1b, 3b, 7b), "
        "a config.json, or the folder of a model to continue.",
        "small-llama",
    )
    tokenizer: str | None = _setting(
        "Folder of a tokenizer to use. Default: the model's, else a byte-level BPE trained on "
        "the data.",
        None,
    )
    vocab_size: int | None = _setting(
        "Vocabulary in tokens. Default: the model's (small-llama: 4096).", None, kind="int"
    )
    optimizer: str = _setting(
        "adarankgrad, adarankgrad-published, galore, fira, orthogonalized-sgd, adamw, or the "
        "dotted path of a class "
        "such as torch.optim.Muon, which trains the weights that low-rank methods project, and "
        "AdamW the others.",
        "adarankgrad",
    )
    optimizer_args: dict[str, Any] = _setting(
        "More arguments of the optimizer as name=value,... (Python literals).", {}, kind="dict"
    )
    lr: float | None = _setting("Peak learning rate. Default: per optimizer.", None, kind="float")
    plain_lr: float | None = _setting(
        "Peak learning rate of weights that low-rank methods do not project: embeddings, head, "
        "norms. Default: --lr where that is given, else per optimizer.",
        None,
        kind="float",
    )
    weight_decay: float = _setting("Decoupled weight decay.", 0.0, kind="float")
    max_rank: int | float | None = _setting(
        "Rank ceiling: columns (64) or share of the short side (0.25).", None, kind="rank"
    )
    min_rank: int | float | None = _setting(
        "Rank floor: columns or share of the short side.", None, kind="rank"
    )
    energy: float | None = _setting(
        "Share of the gradient's energy that the rank must capture, in (0, 1].", None, kind="float"
    )
    steps: int = _setting("Optimizer steps.", 1000, kind="int")
    batch_size: int = _setting("Sequences per forward pass.", 16, kind="int")
    gradient_accumulation: int = _setting("Forward passes per optimizer step.", 1, kind="int")
    accumulate_in_backward: bool = _setting(
        "Project gradients in the backward pass, so that they never pile up. For adarankgrad, "
        "which then takes basis=sketched.",
        False,
        kind="bool",
    )
    powerprop: dict[str, Any] = _setting(
        "Train linear layers' weights by their power: alpha=2, with adam_mode=theta or "
        "preconditioned, decay_on=theta or weight, include and exclude (patterns of names).",
        {},
        kind="dict",
    )
    seq_len: int = _setting("Tokens per sequence.", 256, kind="int")
    warmup_steps: int | None = _setting(
        "Steps of linear warm-up. Default: a tenth of the steps, at most 1000.", None, kind="int"
    )
    lr_schedule: str = _setting("cosine or linear (both fall to 0), or constant.", "cosine")
    max_grad_norm: float = _setting("Gradient norm to clip at; 0 turns it off.", 1.0, kind="float")
    precision: str = _setting("float32, bfloat16 or mixed-bfloat16.", "float32")
    device: str = _setting("auto, cpu, cuda or cuda:N.", "auto")
    seed: int = _setting("Seed of weights, data order and optimizer.", 0, kind="int")
    log_every: int = _setting("Steps between log lines.", 10, kind="int")
    eval_every: int = _setting("Steps between evaluations.", 200, kind="int")
    save_every: int = _setting("Steps between checkpoints.", 200, kind="int")
    keep_checkpoints: int = _setting("Newest checkpoints to keep.", 2, kind="int")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> TrainConfig:
        """Build a checked config from names and values, as they come from flags and TOML.

        Raises:
            UserError: A name is unknown, a value has the wrong type or range, or ``data`` or
                ``output`` is missing.
        """
        for name in settings:
            if name not in FIELDS:
                raise unknown_name("setting", name, sorted(FIELDS))
        for name in ("data", "output"):
            if settings.get(name) is None:
                raise UserError(f"--{name} is missing: {FIELDS[name].metadata['help']}")
        config = cls(**{name: value for name, value in settings.items() if value is not None})
        config.check()
        return config

    def check(self) -> None:
        """Check types and ranges of every field by itself.

        Raises:
            UserError: Naming the field, its value, and what is allowed.
        """
        for name, spec in FIELDS.items():
            _check_type(name, getattr(self, name), spec)
        _check_ranges(self)

    def to_toml(self) -> str:
        """Return the config as TOML; fields that are None are left out."""
        values = asdict(self)
        for name in TABLES:
            values[name] = format_arguments(values[name])
        return "".join(
            f"{name} = {toml_value(value)}\n"
            for name, value in values.items()
            if value is not None and value != ""
        )


FIELDS: dict[str, Field[Any]] = {spec.name: spec for spec in fields(TrainConfig)}
"""Every setting by name, with help text and kind in its metadata."""

TABLES = tuple(name for name, spec in FIELDS.items() if spec.metadata["kind"] == "dict")
"""Settings that are names with values of their own."""

_EXAMPLES = {"optimizer_args": "betas=(0.9,0.95),eps=1e-6", "powerprop": "alpha=2"}

_KINDS = {
    "str": ((str,), "a text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "rank": ((int, float), "a whole number of columns or a share like 0.25"),
    "bool": ((bool,), "true or false"),
    "dict": ((dict,), "names and values"),
}


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file; `TABLES` may be tables or name=value,... text.

    Raises:
        UserError: The file is missing or not TOML, or holds a key that is no setting.
    """
    settings = read_toml_table(path)
    for name in settings:
        if name not in FIELDS:
            raise unknown_name(f"key in {path}:", name, sorted(FIELDS))
    return with_tables(settings)


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


def with_tables(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those that are tables but came as ``name=value,...`` text parsed.

    Raises:
        UserError: Such a text has another form.
    """
    texts = {name: value for name, value in settings.items() if isinstance(value, str)}
    return settings | {n: parse_arguments(text, n) for n, text in texts.items() if n in TABLES}


def parse_arguments(text: str, setting: str = "optimizer_args") -> dict[str, Any]:
    """Parse ``name=value,...``; values are Python literals, bare words and keywords are text.

    Args:
        text: What was given.
        setting: Whose value it is, for the message.

    Example:
        >>> parse_arguments("betas=(0.9, 0.95),carry=squared")
        {'betas': (0.9, 0.95), 'carry': 'squared'}

    Raises:
        UserError: The text has another form.
    """
    try:
        call = ast.parse(f"dict({_KEYWORD_VALUE.sub(_quoted, text)})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        return {_argument_name(word): _literal(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"--{setting.replace('_', '-')} {text!r} cannot be read: write name=value,name=value "
            f"with Python literals, such as {_EXAMPLES[setting]}."
        ) from error


def format_arguments(arguments: dict[str, Any]) -> str:
    """Return the text that `parse_arguments` reads back."""
    return ",".join(f"{name}={value!r}" for name, value in arguments.items())


def parse_rank(text: str) -> int | float:
    """Read ``64`` as columns and ``0.25`` as a share of the short side."""
    try:
        return int(text)
    except ValueError:
        return float(text)


# Words such as raise, which Python would not read as a value.
_WORDS = "|".join(sorted(set(keyword.kwlist) - {"True", "False", "None"}))
_KEYWORD_VALUE = re.compile(rf"=\s*({_WORDS})\s*(?=,|$)")


def _quoted(match: re.Match[str]) -> str:
    return f"={match[1]!r}"


def _argument_name(word: ast.keyword) -> str:
    if word.arg is None:
        raise ValueError
    return word.arg


def _literal(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _check_type(name: str, value: Any, spec: Field[Any]) -> None:
    if value is None and spec.default is None:
        return
    types, wanted = _KINDS[spec.metadata["kind"]]
    # A bool is an int to Python.
    if not isinstance(value, types) or isinstance(value, bool) != (bool in types):
        raise UserError(f"{name} = {value!r} is not {wanted}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} = {value!r} is not a finite number.")


def _check_ranges(config: TrainConfig) -> None:
    for name in ("data", "output"):
        if not getattr(config, name):
            raise UserError(f"{name} is empty: {FIELDS[name].metadata['help']}")
    for name in (
        "lr",
        "plain_lr",
        "steps",
        "batch_size",
        "gradient_accumulation",
        "vocab_size",
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
    ):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"{name} = {value} must be greater than 0.")
    for name in ("weight_decay", "max_grad_norm", "warmup_steps", "seed"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"{name} = {value} must not be negative.")
    if config.seed >= 2**32:
        raise UserError(f"seed = {config.seed} must be below 2**32.")
    if config.seq_len < 2:
        raise UserError(
            f"seq_len = {config.seq_len} must be at least 2: one token predicts the next."
        )
    if config.warmup_steps is not None and config.warmup_steps > config.steps:
        raise UserError(
            f"warmup_steps = {config.warmup_steps} is more than steps = {config.steps}."
        )
    if config.energy is not None and not 0 < config.energy <= 1:
        raise UserError(
            f"energy = {config.energy} is outside (0, 1]: it is the share of the gradient's "
            "energy to capture, such as 0.9."
        )
    _check_rank("max_rank", config.max_rank)
    _check_rank("min_rank", config.min_rank)
    for name, allowed in (("precision", PRECISIONS), ("lr_schedule", LR_SCHEDULES)):
        if getattr(config, name) not in allowed:
            raise unknown_name(name, getattr(config, name), list(allowed))


def _check_rank(name: str, rank: int | float | None) -> None:
    if rank is None:
        return
    if isinstance(rank, int) and rank < 1:
        raise UserError(f"{name} = {rank} must be at least 1 column.")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise UserError(
            f"{name} = {rank} is outside (0, 1]: give a share of the short side such as 0.25, "
            "or a whole number of columns."
        )


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
