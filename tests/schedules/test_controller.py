"""When the batch grows: monotone, capped, in whole micro-batches, and the same after a resume."""

import math

import pytest

from adarankgrad.core.gradient_noise import GradientNoise
from adarankgrad.schedules.adadagrad import AdAdaGradConfig, BatchSizeController

NOISES = [GradientNoise(8, 1.0, variance) for variance in (3.0, 9.5, 2.0, 0.0, 30.0, 1.0, 500.0)]


def controller(micro_batch_size=4, num_micro_batches=2, **settings):
    config = AdAdaGradConfig(**{"max_batch_size": 64, "eta": 1.0, **settings})
    return BatchSizeController(
        config, micro_batch_size=micro_batch_size, num_micro_batches=num_micro_batches
    )


def run(control, noises):
    sizes = []
    for noise in noises:
        control.end_step(noise if control.is_test_due else None)
        sizes.append(control.batch_size)
    return sizes


def test_the_batch_grows_in_whole_micro_batches_never_shrinks_and_stops_at_the_cap():
    control = controller()
    assert run(control, NOISES) == [8, 12, 12, 12, 32, 32, 64]
    assert not control.is_test_due


def test_a_cap_between_micro_batches_is_rounded_down():
    control = controller(max_batch_size=63)
    assert run(control, NOISES)[-1] == 60
    assert not control.is_test_due


def test_at_the_cap_nothing_is_tested_again():
    control = controller(max_batch_size=8)
    assert not control.is_test_due
    assert run(control, NOISES) == [8] * len(NOISES)


def test_only_every_third_step_is_tested():
    control, due = controller(test_every=3), []
    for _ in range(7):
        due.append(control.is_test_due)
        control.end_step()
    assert due == [False, False, True, False, False, True, False]


@pytest.mark.parametrize(
    "noise", [GradientNoise(8, math.inf, 1.0), GradientNoise(8, 1.0, math.nan)]
)
def test_noise_that_is_not_finite_changes_nothing(noise):
    assert run(controller(), [noise]) == [8]


def test_an_infinite_tolerance_never_grows_the_batch():
    assert run(controller(eta=math.inf), NOISES) == [8] * len(NOISES)


def test_no_mean_at_all_asks_for_the_cap():
    assert run(controller(), [GradientNoise(8, 0.0, 1.0)]) == [64]


def test_the_augmented_test_takes_the_larger_of_two():
    noise = GradientNoise(8, 1.0, 0.0, inner_variance=20.0, orthogonal_variance=5.0)
    settings = {"statistics": "per-sample", "micro_batch_size": 1, "num_micro_batches": 8}
    assert run(controller(test="inner-product", **settings), [noise]) == [20]
    assert run(controller(test="augmented", **settings), [noise]) == [20]
    assert run(controller(test="augmented", nu=0.4, **settings), [noise]) == [32]  # 5 / 0.16


def test_a_saved_state_continues_the_sequence():
    whole = run(controller(test_every=2), NOISES)
    for step in range(len(NOISES)):
        first, second = controller(test_every=2), controller(test_every=2)
        sizes = run(first, NOISES[:step])
        state = first.state_dict()
        assert all(type(value) is int for value in state.values())
        second.load_state_dict(state)
        assert sizes + run(second, NOISES[step:]) == whole


def test_a_state_above_the_cap_is_refused():
    with pytest.raises(ValueError, match="above max_batch_size = 8"):
        controller(max_batch_size=8).load_state_dict({"num_micro_batches": 3, "num_steps": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.0}, "eta must be above 0"),
        ({"eta": math.nan}, "eta must be above 0"),
        ({"eta": "small"}, "eta must be above 0"),
        ({"max_batch_size": 0}, "max_batch_size must be an int of at least 1"),
        ({"test": "sign"}, "test must be one of norm, inner-product, augmented"),
        ({"statistics": "none"}, "statistics must be one of"),
        ({"test": "inner-product"}, "statistics='per-sample'"),
        ({"nu": 0.1}, "nu is of test='augmented'"),
        ({"test_every": 0}, "test_every must be an int"),
        ({"max_batch_size": 7}, "below the batch at the start, 2 x 4"),
        ({"num_micro_batches": 1}, "accumulate at least two"),
        ({"num_micro_batches": 1, "micro_batch_size": 1, "statistics": "norms"}, "one sample"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        controller(**settings)
