"""The figures of a comparison: colours, names beside points, captions, no refreshes at all."""

from dataclasses import replace
from itertools import combinations

import pytest
from fake_run import write_fake_run
from matplotlib.text import Text

from adarankgrad.compare.figures import (
    TradeOff,
    has_refreshes,
    refresh_figure,
    trade_off_figure,
)
from adarankgrad.compare.plan import Method
from adarankgrad.compare.results import MethodResult
from adarankgrad.train.figure_style import METHOD_COLOURS, caption_from, distinct_colours
from adarankgrad.train.plots import caption_of
from adarankgrad.train.record import load_run

CROWDED = {
    "AdamW": (1.0, [4.102, 4.099, 4.109]),
    "AdamW 8-bit": (0.263, [4.119, 4.100, 4.103]),
    "GaLore": (0.323, [4.150, 4.157, 4.141]),
    "Fira": (0.323, [4.090, 4.101, 4.092]),
    "APOLLO": (0.322, [4.125, 4.099, 4.112]),
    "Orthogonalized SGD": (0.0, [4.114, 4.098, 4.101]),
}


def result_of(run):
    return MethodResult(Method("ours", {"optimizer": "adarankgrad"}), [], None, {0: run}, {})


def test_ranks_that_are_logged_without_any_refresh_make_no_figure_of_refreshes(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run"))
    assert has_refreshes([result_of(run)])
    for row in run.ranks:
        for layer in row["layers"]:
            layer.update(refresh_reason=None, num_refreshes=0)
    assert not has_refreshes([result_of(run)])
    refresh_figure([result_of(run)], "caption").canvas.draw()


def test_names_in_a_crowded_trade_off_cover_no_other_name_point_or_error_bar():
    points = [TradeOff(label, *at, "#000000") for label, at in CROWDED.items()]
    figure = trade_off_figure(points, "caption")
    figure.canvas.draw()
    axes = figure.axes[0]
    names = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert set(names) == set(CROWDED)
    for one, other in combinations(names.values(), 2):
        assert not one.overlaps(other)
    for box in names.values():
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        for share, losses in CROWDED.values():
            x, low = axes.transData.transform((100 * share, min(losses)))
            high = axes.transData.transform((100 * share, max(losses)))[1]
            assert not (box.x0 < x < box.x1 and low < box.y1 and high > box.y0)


def test_a_named_method_keeps_its_colour_whatever_stands_before_it():
    methods = ["torchao AdamW8bit", "OrthogonalizedSGD", "APOLLO", "unknown", *METHOD_COLOURS]
    methods.remove("Apollo")
    methods.remove("Orthogonalized SGD")
    colours = dict(zip(methods, distinct_colours(methods), strict=True))
    fixed = {**METHOD_COLOURS, "OrthogonalizedSGD": METHOD_COLOURS["Orthogonalized SGD"]}
    fixed["APOLLO"] = METHOD_COLOURS["Apollo"]
    assert {name: colours[name] for name in methods if name in fixed} == {
        name: fixed[name] for name in methods if name in fixed
    }


def test_as_many_methods_as_there_are_colours_all_differ():
    methods = ["AdaRankGrad", "AdaRankGrad", *map(str, range(len(METHOD_COLOURS) - 2))]
    assert len(set(distinct_colours(methods))) == len(METHOD_COLOURS)
    assert distinct_colours(methods)[0] == METHOD_COLOURS["AdaRankGrad"]


@pytest.mark.parametrize("commits", [[], ["", None]])
def test_a_caption_without_a_commit_is_its_text(commits):
    assert caption_from(commits, "text") == "text"


def test_a_caption_begins_with_the_commits_which_no_cut_can_lose(tmp_path):
    run = load_run(write_fake_run(tmp_path / "run"))
    dated = replace(run, info={**run.info, "commit": "0123456789abcdef"})
    assert caption_of(dated) == f"commit 0123456789ab: {run.command}"
    assert caption_from(["bb", "aa", "bb"], "text") == "commit aa, bb: text"
