"""Where gradients are taken, and how far from the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...core.checks import check_choice, check_flag, check_number

Source = Literal["past-local", "fresh", "past-global", "noise"]
Scale = Literal["gradient", "layer", "filter"]
Noise = Literal["gaussian", "uniform"]


@dataclass(frozen=True)
class ExtrapolationConfig:
    """Gradients are taken at x̃ = x − step·ζ.

    Attributes:
        step: γ̂, at least 0, in units of weight a gradient (a learning rate of plain SGD); 0 changes
            nothing.
        source: ζ. ``"past-local"``: the gradient of this worker's last micro-batch in the step
            before, taken at its x̃ (Extrap-SGD). ``"fresh"``: that of one micro-batch at x
            (extragradient; a forward and backward pass more). ``"past-global"``: the whole gradient
            of the step before, averaged over micro-batches and workers, not clipped. ``"noise"``:
            random numbers of mean 0 that no two workers share.
        scale: standard deviation of noise: a number; ``"gradient"``, for each weight the root
            mean square of its past local gradient; ``"layer"``, that of the weight itself; or
            ``"filter"``, that of each of its rows. Must be given for noise, and for noise only.
        noise: its distribution, ``"gaussian"`` or ``"uniform"``.
        follow_lr: multiply the step by lr / initial_lr, at most 1, which a scheduler leaves in the
            optimizer's groups: with its warm-up and decay.

    Raises:
        ValueError: a setting is out of range, unknown, missing or of no use to the source.
    """

    step: float
    source: Source = "past-local"
    scale: float | Scale | None = None
    noise: Noise = "gaussian"
    follow_lr: bool = True

    def __post_init__(self) -> None:
        check_number("step", self.step, low=0.0)
        check_choice("source", self.source, get_args(Source))
        check_choice("noise", self.noise, get_args(Noise))
        check_flag("follow_lr", self.follow_lr)
        if self.source == "noise":
            _check_scale(self.scale)
        elif self.scale is not None or self.noise != "gaussian":
            raise ValueError(
                f"scale and noise are of source='noise', and source is {self.source!r}: leave them "
                "out"
            )

    @property
    def needs_local_grad(self) -> bool:
        """Whether something of the step before is needed that this worker's gradient tells."""
        return self.source == "past-local" or self.scale == "gradient"


def _check_scale(scale: Any) -> None:
    if scale is None:
        raise ValueError(
            "source='noise' needs a scale: a standard deviation, or one of "
            f"{', '.join(get_args(Scale))}"
        )
    if isinstance(scale, str):
        check_choice("scale", scale, get_args(Scale))
    else:
        check_number("scale", scale, low=0.0, is_low_allowed=False)
