"""The settings that every kind of run has: one dataclass behind flags, TOML file and API.

Each field carries its help text, so that the command line, the TOML keys and the class cannot
drift apart. Nothing here imports torch: ``adarankgrad --help`` stays fast.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from adarankgrad.train.errors import UserError, unknown_name
from adarankgrad.train.values import (
    format_arguments,
    parse_arguments,
    read_toml_table,
    toml_value,
)

PRECISIONS = ("float32", "bfloat16", "mixed-bfloat16")
LR_SCHEDULES = ("cosine", "linear", "constant")
_Config = TypeVar("_Config", bound="RunConfig")


def setting(help: str, default: Any = MISSING, *, kind: str = "str", example: str = "") -> Any:
    """Make a field of a config.

    Args:
        help: What it is, for ``--help``.
        default: Its value where none is given; without one it must be given.
        kind: One of `_KINDS`: how it is read and checked.
        example: Of a table's ``name=value,...``, for messages.
    """
    metadata = {"help": help, "kind": kind, "example": example}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What decides the result of any run, beside its data.

    Fields that default to None are chosen from the others when training starts (learning rate from
    the optimizer, warm-up from the steps) or left to the optimizer.

    Attributes:
        command: The subcommand of ``adarankgrad`` that makes such runs.
        length_flag: The flag that sets how long their inputs are.
        implied_arguments: By optimizer, what its arguments are where ``optimizer_args`` is silent.
    """

    command: ClassVar[str]
    length_flag: ClassVar[str]
    implied_arguments: ClassVar[dict[str, dict[str, Any]]] = {}

    output: str = setting("Run folder to write.")
    model: str = setting("Folder of a model.")
    optimizer: str = setting(
        "adarankgrad, adarankgrad-low-memory, adarankgrad-published, galore, fira, "
        "orthogonalized-sgd, adagrad-norm, adamw, or the dotted path of a class such as "
        "torch.optim.Muon, which trains the weights that low-rank methods project, and AdamW the "
        "others.",
        "adarankgrad",
    )
    optimizer_args: dict[str, Any] = setting(
        "More arguments of the optimizer as name=value,... (Python literals).",
        {},
        kind="dict",
        example="betas=(0.9,0.95),eps=1e-6",
    )
    lr: float | None = setting("Peak learning rate. Default: per optimizer.", None, kind="float")
    plain_lr: float | None = setting(
        "Peak learning rate of embeddings, head and norms, which low-rank methods do not project "
        "(low-memory: but norms). Default: --lr where that is given, else per optimizer.",
        None,
        kind="float",
    )
    weight_decay: float = setting("Decoupled weight decay.", 0.0, kind="float")
    max_rank: int | float | None = setting(
        "Rank ceiling: columns (64) or share of the short side (0.25).", None, kind="rank"
    )
    min_rank: int | float | None = setting(
        "Rank floor: columns or share of the short side.", None, kind="rank"
    )
    energy: float | None = setting(
        "Share of the gradient's energy that the rank must capture, in (0, 1].", None, kind="float"
    )
    steps: int = setting(
        "Optimizer steps; with --adadagrad, how many there would be without it.", 1000, kind="int"
    )
    batch_size: int = setting("Sequences per forward pass.", 16, kind="int")
    gradient_accumulation: int = setting("Forward passes per optimizer step.", 1, kind="int")
    accumulate_in_backward: bool = setting(
        "Project gradients in the backward pass, so that they never pile up. For adarankgrad, "
        "which then takes basis=sketched, and adarankgrad-low-memory.",
        False,
        kind="bool",
    )
    activation_checkpointing: bool = setting(
        "Compute activations again in the backward pass, and keep only those between layers.",
        False,
        kind="bool",
    )
    powerprop: dict[str, Any] = setting(
        "Train linear layers' weights by their power: alpha=2, with adam_mode=theta or "
        "preconditioned, decay_on=theta or weight, include and exclude (patterns of names).",
        {},
        kind="dict",
        example="alpha=2",
    )
    adadagrad: dict[str, Any] = setting(
        "Let the batch grow by accumulation where its gradient is too noisy, for the same number "
        "of samples in all: max_batch_size=512 (in samples), with eta=0.1, test=norm, "
        "inner-product or augmented, statistics=micro-batches, norms or per-sample, test_every=1, "
        "nu, chunk_size.",
        {},
        kind="dict",
        example="max_batch_size=512,eta=0.1",
    )
    extrapolation: dict[str, Any] = setting(
        "Take gradients at a point ahead of the weights: step=0.1 (in units of weight a gradient), "
        "with source=past-local, fresh, past-global or noise, scale (of noise: a number, gradient, "
        "layer or filter), noise=gaussian or uniform, follow_lr=True.",
        {},
        kind="dict",
        example="step=0.1",
    )
    progressive_depth: dict[str, Any] = setting(
        "Train few layers first, used for many, and let the model grow by copying them: "
        "layers=(3,6,12),starts=(0,500,1000) (in steps, or with unit=tokens), with "
        "sampling=low_value, uniform, constant_high or constant_low, layer_map=interpolate or "
        "stack, optimizer_state=copied, kept or fresh, layer_list (name).",
        {},
        kind="dict",
        example="layers=(3,6,12),starts=(0,500,1000)",
    )
    warmup_steps: int | None = setting(
        "Steps of linear warm-up. Default: a tenth of the steps, at most 1000.", None, kind="int"
    )
    lr_schedule: str = setting("cosine or linear (both fall to 0), or constant.", "cosine")
    max_grad_norm: float = setting("Gradient norm to clip at; 0 turns it off.", 1.0, kind="float")
    precision: str = setting("float32, bfloat16 or mixed-bfloat16.", "float32")
    device: str = setting("auto, cpu, cuda or cuda:N.", "auto")
    seed: int = setting("Seed of weights, data order and optimizer.", 0, kind="int")
    log_every: int = setting("Steps between log lines.", 10, kind="int")
    eval_every: int = setting("Steps between evaluations.", 200, kind="int")
    save_every: int = setting("Steps between checkpoints.", 200, kind="int")
    keep_checkpoints: int = setting("Newest checkpoints to keep.", 2, kind="int")

    @property
    def samples_per_step(self) -> int:
        """Samples in a step, at the start of a run where the batch grows."""
        return self.batch_size * self.gradient_accumulation

    @classmethod
    def settings(cls) -> dict[str, Field[Any]]:
        """Return every setting by name, with help text and kind in its metadata; own ones first."""
        specs = {spec.name: spec for spec in fields(cls)}
        own = [name for name in inspect.get_annotations(cls) if name in specs]
        return {name: specs[name] for name in [*own, *specs]}

    @classmethod
    def tables(cls) -> tuple[str, ...]:
        """Return the settings that are names with values of their own."""
        specs = cls.settings().items()
        return tuple(name for name, spec in specs if spec.metadata["kind"] == "dict")

    @classmethod
    def from_settings(cls: type[_Config], settings: dict[str, Any]) -> _Config:
        """Build a checked config from names and values, as they come from flags and TOML.

        Raises:
            UserError: A name is unknown, a value has the wrong type or range, or one without
                default is missing.
        """
        allowed = cls.settings()
        for name in settings:
            if name not in allowed:
                raise unknown_name("setting", name, sorted(allowed))
        for name, spec in allowed.items():
            if is_required(spec) and settings.get(name) is None:
                raise UserError(f"--{name} is missing: {spec.metadata['help']}")
        config = cls(**{name: value for name, value in settings.items() if value is not None})
        config.check()
        return config

    def check(self) -> None:
        """Check types and ranges of every field by itself.

        Raises:
            UserError: Naming the field, its value, and what is allowed.
        """
        for name, spec in self.settings().items():
            value = getattr(self, name)
            _check_type(name, value, spec)
            if is_required(spec) and not value:
                raise UserError(f"{name} is empty: {spec.metadata['help']}")
        _check_ranges(self)
        self.check_own()

    def check_own(self) -> None:
        """Check the ranges of the settings that only this kind of run has."""

    def to_toml(self) -> str:
        """Return the config as TOML; fields that are None are left out."""
        values = {name: getattr(self, name) for name in self.settings()}
        for name in self.tables():
            values[name] = format_arguments(values[name])
        return "".join(
            f"{name} = {toml_value(value)}\n"
            for name, value in values.items()
            if value is not None and value != ""
        )


_KINDS = {
    "str": ((str,), "a text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "rank": ((int, float), "a whole number of columns or a share like 0.25"),
    "bool": ((bool,), "true or false"),
    "dict": ((dict,), "names and values"),
}


def read_toml(path: Path, config_class: type[RunConfig]) -> dict[str, Any]:
    """Read settings from a TOML file; tables may also be name=value,... text.

    Raises:
        UserError: The file is missing or not TOML, or holds a key that is no setting.
    """
    settings = read_toml_table(path)
    allowed = config_class.settings()
    for name in settings:
        if name not in allowed:
            raise unknown_name(f"key in {path}:", name, sorted(allowed))
    return with_tables(settings, config_class)


def with_tables(settings: dict[str, Any], config_class: type[RunConfig]) -> dict[str, Any]:
    """Return settings with those that are tables but came as ``name=value,...`` text parsed.

    Raises:
        UserError: Such a text has another form.
    """
    specs = config_class.settings()
    return settings | {
        name: parse_arguments(settings[name], flag_of(name), specs[name].metadata["example"])
        for name in config_class.tables()
        if isinstance(settings.get(name), str)
    }


def is_required(spec: Field[Any]) -> bool:
    """Tell whether a setting has no default."""
    return spec.default is MISSING and spec.default_factory is MISSING


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def check_positive(name: str, value: float | None) -> None:
    """Refuse a number that is given and not above 0."""
    if value is not None and value <= 0:
        raise UserError(f"{name} = {value} must be greater than 0.")


def _check_type(name: str, value: Any, spec: Field[Any]) -> None:
    if value is None and spec.default is None:
        return
    types, wanted = _KINDS[spec.metadata["kind"]]
    # A bool is an int to Python.
    if not isinstance(value, types) or isinstance(value, bool) != (bool in types):
        raise UserError(f"{name} = {value!r} is not {wanted}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} = {value!r} is not a finite number.")


def _check_ranges(config: RunConfig) -> None:
    for name in (
        "lr",
        "plain_lr",
        "steps",
        "batch_size",
        "gradient_accumulation",
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
    ):
        check_positive(name, getattr(config, name))
    for name in ("weight_decay", "max_grad_norm", "warmup_steps", "seed"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"{name} = {value} must not be negative.")
    if config.seed >= 2**32:
        raise UserError(f"seed = {config.seed} must be below 2**32.")
    if config.warmup_steps is not None and config.warmup_steps > (config.steps or math.inf):
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
