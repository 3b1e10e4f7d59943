"""Which methods of a run do not go together; ``docs/combinations.md`` is this table in words.

What depends on the optimizer's class or on the model is refused where these are known: by
`optimizers.accumulate_gradients`, and by each method as it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from adarankgrad.reparam import PowerpropConfig
from adarankgrad.schedules.adadagrad import AdAdaGradConfig
from adarankgrad.schedules.depth import DepthConfig
from adarankgrad.schedules.extrapolation import ExtrapolationConfig
from adarankgrad.train.errors import UserError
from adarankgrad.train.extrapolated import extrapolation_settings
from adarankgrad.train.growing_batch import adadagrad_settings
from adarankgrad.train.growing_depth import depth_settings
from adarankgrad.train.optimizers import find_optimizer
from adarankgrad.train.powered import powerprop_settings

if TYPE_CHECKING:
    from adarankgrad.train.run_config import RunConfig


@dataclass(frozen=True)
class ChosenMethods:
    """The methods of a run; None where it goes without.

    Attributes:
        config: All settings.
        powerprop: How weights are trained by powers.
        adadagrad: How the batch grows.
        depth: How the model grows.
        extrapolation: Where gradients are taken.
        adapter: What is trained beside a pretrained model.
    """

    config: RunConfig
    powerprop: PowerpropConfig | None
    adadagrad: AdAdaGradConfig | None
    depth: DepthConfig | None
    extrapolation: ExtrapolationConfig | None
    adapter: str | None

    @classmethod
    def of(cls, config: RunConfig) -> ChosenMethods:
        """Read the settings of all methods.

        Raises:
            UserError: One is unknown, missing or out of range.
        """
        adapter = getattr(config, "method", "full")  # of fine-tuning only
        return cls(
            config,
            powerprop_settings(config),
            adadagrad_settings(config),
            depth_settings(config),
            extrapolation_settings(config),
            None if adapter == "full" else adapter,
        )

    @property
    def statistics(self) -> str | None:
        """What AdAdaGrad's test is computed from."""
        return None if self.adadagrad is None else self.adadagrad.statistics

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """What is said of the adapter, as it is given."""
        return getattr(self.config, "adapter", {})  # of fine-tuning only

    @property
    def has_phases(self) -> bool:
        """Whether SoRA trains in phases, of which each has a schedule of its own."""
        return self.adapter == "sora" and bool(self.adapter_settings.get("num_phases"))

    @property
    def is_preconditioned(self) -> bool:
        """Whether powered weights take the optimizer's step times their slope."""
        chosen = self.powerprop
        return (
            chosen is not None and chosen.changes_updates and chosen.adam_mode == "preconditioned"
        )


class Refusal(NamedTuple):
    """Two settings that do not go together.

    Attributes:
        first: One of them, as it is typed.
        second: The other.
        reason: Why not.
        advice: What to do.
        applies: Whether a run has both.
    """

    first: str
    second: str
    reason: str
    advice: str
    applies: Callable[[ChosenMethods], bool]

    @property
    def message(self) -> str:
        """The line that says so."""
        return f"{self.first} does not go together with {self.second}: {self.reason}; {self.advice}"


_LEAVE_OUT = "leave one of them out."

REFUSALS = (
    Refusal(
        "--adadagrad",
        "--extrapolation",
        "its test is of gradients at the weights",
        _LEAVE_OUT,
        lambda run: run.adadagrad is not None and run.extrapolation is not None,
    ),
    Refusal(
        "--adadagrad statistics=norms or per-sample",
        "--accumulate-in-backward",
        "they need whole gradients, which are not kept",
        "use statistics=micro-batches, or " + _LEAVE_OUT,
        lambda run: run.config.accumulate_in_backward and run.statistics in ("norms", "per-sample"),
    ),
    Refusal(
        "--adadagrad statistics=norms",
        "--powerprop",
        "norms are read of a layer's weight, not of what it is a power of",
        "use statistics=micro-batches or per-sample.",
        lambda run: run.powerprop is not None and run.statistics == "norms",
    ),
    Refusal(
        "--adadagrad statistics=norms",
        "--progressive-depth",
        "norms are read of layers that run once, and these stand in for others",
        "use statistics=micro-batches or per-sample.",
        lambda run: run.depth is not None and run.statistics == "norms",
    ),
    Refusal(
        "--adadagrad statistics=per-sample",
        "--activation-checkpointing",
        "torch.func cannot differentiate what is computed again",
        "use statistics=micro-batches or norms.",
        lambda run: run.config.activation_checkpointing and run.statistics == "per-sample",
    ),
    Refusal(
        "--adadagrad statistics=per-sample",
        "--precision mixed-bfloat16",
        "torch.func mixes up its dtypes",
        "use statistics=norms, or another precision.",
        lambda run: run.config.precision == "mixed-bfloat16" and run.statistics == "per-sample",
    ),
    Refusal(
        "--adadagrad statistics=norms or per-sample",
        "--method sara",
        "torch.func cannot differentiate its sparse weights",
        "use statistics=micro-batches.",
        lambda run: run.adapter == "sara" and run.statistics in ("norms", "per-sample"),
    ),
    Refusal(
        "--progressive-depth unit=steps",
        "--adadagrad",
        "a run whose batch grows may take any number of steps",
        "give starts in tokens, with unit=tokens.",
        lambda run: (
            run.adadagrad is not None and run.depth is not None and run.depth.unit == "steps"
        ),
    ),
    Refusal(
        "--extrapolation source=past-global",
        "--accumulate-in-backward",
        "it needs whole gradients, which are not kept",
        "use source=past-local, or " + _LEAVE_OUT,
        lambda run: (
            run.config.accumulate_in_backward
            and run.extrapolation is not None
            and run.extrapolation.source == "past-global"
        ),
    ),
    Refusal(
        "--powerprop adam_mode=preconditioned",
        "--accumulate-in-backward",
        "it rescales the optimizer's whole step, of which a part is taken in the backward pass",
        _LEAVE_OUT,
        lambda run: run.config.accumulate_in_backward and run.is_preconditioned,
    ),
    Refusal(
        "--powerprop adam_mode=preconditioned or decay_on=weight",
        "--precision bfloat16",
        "they need float32 weights",
        "use --precision mixed-bfloat16 or float32.",
        lambda run: (
            run.config.precision == "bfloat16"
            and run.powerprop is not None
            and run.powerprop.changes_updates
        ),
    ),
    Refusal(
        "--method sara",
        "--optimizer adarankgrad or another that projects",
        "its values are vectors, and only matrices are projected",
        "use --optimizer adamw.",
        lambda run: run.adapter == "sara" and find_optimizer(run.config.optimizer).is_low_rank,
    ),
    Refusal(
        "--method sara without reselect_at=None",
        "--adadagrad",
        "its second selection counts steps, and a run whose batch grows takes fewer",
        "give --adapter reselect_at=None, or " + _LEAVE_OUT,
        lambda run: (
            run.adapter == "sara"
            and run.adadagrad is not None
            and run.adapter_settings.get("reselect_at", "default") is not None
        ),
    ),
    Refusal(
        "--method sora with num_phases or without shrinkage",
        "--adadagrad",
        "what its gates lose counts steps, and a run whose batch grows takes fewer",
        "give --adapter shrinkage=... and no num_phases, or " + _LEAVE_OUT,
        lambda run: (
            run.adapter == "sora"
            and run.adadagrad is not None
            and (run.has_phases or run.adapter_settings.get("shrinkage") is None)
        ),
    ),
    Refusal(
        "--method sora with num_phases",
        "--lr-schedule linear or constant",
        "the rate warms up and decays in every phase",
        _LEAVE_OUT,
        lambda run: run.has_phases and run.config.lr_schedule != "cosine",
    ),
    Refusal(
        "--method lora, prilora, sora or sara",
        "--powerprop",
        "the model's own weights stay as they are",
        "use --method full, or " + _LEAVE_OUT,
        lambda run: run.adapter is not None and run.powerprop is not None,
    ),
    Refusal(
        "--method lora, prilora, sora or sara",
        "--progressive-depth",
        "an adapter is of a model that stays as it is",
        "use --method full, or " + _LEAVE_OUT,
        lambda run: run.adapter is not None and run.depth is not None,
    ),
    Refusal(
        "--method lora, prilora, sora or sara",
        "--accumulate-in-backward",
        "the gradients of an adapter are small as they are",
        "use --method full, or " + _LEAVE_OUT,
        lambda run: run.adapter is not None and run.config.accumulate_in_backward,
    ),
)


def check_combinations(config: RunConfig) -> None:
    """Refuse methods that do not go together.

    Raises:
        UserError: Two do not, or a setting of one is unknown, missing or out of range.
    """
    methods = ChosenMethods.of(config)
    for refusal in REFUSALS:
        if refusal.applies(methods):
            raise UserError(refusal.message)
