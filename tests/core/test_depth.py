"""Layer maps and depths against their definitions."""

from collections import Counter
from fractions import Fraction

import pytest
import torch

from adarankgrad.core.depth import DEPTH_RULES, interpolate, low_value_depth, stack
from adarankgrad.schedules.depth import DepthConfig


def low_value_law(num_layers: int, max_depth: int) -> dict[int, float]:
    """P(L): L >= k exactly where x <= N·m/k - n, for x even on [1e-6, 1]."""
    top = max_depth / num_layers + 0.4
    n = (top * 1e-6 - 0.6) / (0.6 - top)
    m = 0.6 * (n + 1)

    def at_least(depth: int) -> float:
        share = (num_layers * m / depth - n - 1e-6) / (1 - 1e-6)
        return min(1.0, max(0.0, share)) if num_layers < depth <= max_depth else depth <= num_layers

    depths = range(num_layers, max_depth + 1)
    return {depth: at_least(depth) - at_least(depth + 1) for depth in depths}


def test_interpolation_is_the_floor_never_falls_and_uses_every_layer():
    for depth in range(1, 129):
        for num_layers in range(1, depth + 1):
            positions = interpolate(num_layers, depth)
            assert positions == sorted(positions)
            assert set(positions) == set(range(num_layers))
            assert len(positions) == depth
    for num_layers, depth in ((14, 18), (7, 12), (64, 128), (5, 127)):
        exact = [Fraction(j * num_layers, depth) for j in range(depth)]
        assert interpolate(num_layers, depth) == [value.__floor__() for value in exact]
    # In floats, int(9 / (18 / 14)) is 6.
    assert interpolate(14, 18)[9] == 7


def test_stacking_repeats_blocks_and_then_top_layers():
    assert stack(3, 3) == [0, 1, 2]
    assert stack(3, 4) == [0, 1, 2, 2]
    assert stack(3, 5) == [0, 1, 2, 1, 2]
    assert stack(3, 6) == [0, 1, 2, 0, 1, 2]
    assert stack(1, 3) == [0, 0, 0]


@pytest.mark.parametrize("layer_map", [interpolate, stack])
def test_no_layer_is_copied_downwards(layer_map):
    for depth in range(1, 49):
        for num_layers in range(1, depth + 1):
            positions = layer_map(num_layers, depth)
            assert all(source <= place for place, source in enumerate(positions))
    with pytest.raises(ValueError, match=r"num_layers must be in \[1, depth\]"):
        layer_map(3, 2)


def test_low_values_follow_the_hyperbola_exactly():
    num_draws = 20_000
    for num_layers in (1, 3, 6):
        drawn = Counter(
            low_value_depth(num_layers, 12, (i + 0.5) / num_draws) for i in range(num_draws)
        )
        law = low_value_law(num_layers, 12)
        assert set(drawn) <= set(law)
        for depth, probability in law.items():
            # An interval of x holds its share of an even grid, but for one point at each end.
            assert drawn[depth] / num_draws == pytest.approx(probability, abs=2 / num_draws)


@pytest.mark.parametrize(
    ("num_layers", "lowest", "highest", "mean"),
    [(1, 0.736, 0.0017, 1.77), (3, 0.637, 0.0158, 4.23), (6, 0.648, 0.0667, 7.13), (12, 1, 1, 12)],
)
def test_the_law_is_the_one_that_was_found_by_sampling_the_published_code(
    num_layers, lowest, highest, mean
):
    law = low_value_law(num_layers, 12)
    # Half a unit of the last digit that the table gives.
    assert law[num_layers] == pytest.approx(lowest, abs=5e-4)
    assert law[12] == pytest.approx(highest, abs=5e-5)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    found = sum(depth * probability for depth, probability in law.items())
    # Besides, the mean may be of its 200,000 samples, with a standard error below 0.006.
    assert found == pytest.approx(mean, abs=5e-3 + 6e-3)


def test_the_published_stages_cost_86_percent_of_the_layers_work():
    epochs = {1: 2, 3: 2, 6: 6, 12: 30}
    means = {n: sum(d * p for d, p in low_value_law(n, 12).items()) for n in epochs}
    share = sum(means[n] * count for n, count in epochs.items()) / (12 * 40)
    assert share == pytest.approx(0.864, abs=5e-4)


def test_depths_drawn_for_steps_follow_the_law():
    config = DepthConfig(layers=(3, 12), starts=(0, 1))
    num_steps = 5000
    drawn = Counter(config.sample_depth(3, 7, step) for step in range(num_steps))
    chi_squared = sum(
        (drawn[depth] - num_steps * probability) ** 2 / (num_steps * probability)
        for depth, probability in low_value_law(3, 12).items()
    )
    # Nine degrees of freedom: 33.7 is exceeded once in 10,000 seeds.
    assert chi_squared < 33.7


@pytest.mark.parametrize("rule", DEPTH_RULES.values())
@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
def test_depths_lie_between_the_layers_and_the_model_and_full_depth_stays(rule, draw):
    assert all(n <= rule(n, 12, draw) <= 12 for n in range(1, 13))
    assert all(rule(n, n, draw) == n for n in range(1, 65))


def test_other_rules_are_even_or_constant():
    drawn = Counter(DEPTH_RULES["uniform"](3, 12, i / 1000) for i in range(1000))
    assert drawn == {depth: 100 for depth in range(3, 13)}
    assert DEPTH_RULES["constant_high"](3, 12, 0.9) == 12
    assert DEPTH_RULES["constant_low"](3, 12, 0.0) == 3


def test_the_depth_of_a_step_depends_on_seed_and_step_alone():
    config = DepthConfig(layers=(2, 16), starts=(0, 1), sampling="uniform")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    depths = [config.sample_depth(2, 0, step) for step in range(40)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    torch.rand(3)
    assert [config.sample_depth(2, 0, step) for step in reversed(range(40))] == depths[::-1]
    assert [config.sample_depth(2, 1, step) for step in range(40)] != depths
