"""One picture instead of many, for tests of comparisons that do not look at pictures."""

import functools

from matplotlib.figure import Figure

from adarankgrad.train.figure_style import to_png


def same_picture(figure, caption):
    """Stand in for `to_png`, which takes longer than the runs of most tests."""
    return _picture()


@functools.cache
def _picture():
    figure = Figure(figsize=(7, 4))
    figure.add_subplot().imshow([range(100)], aspect="auto")
    return to_png(figure, "a picture")
