"""A browser for tests that look at pages, where headless Chromium is installed."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
WINDOW_WIDTHS = [390, 1280]
"""A phone's and a desktop's, in CSS pixels."""


def assert_fits(page: Path, width: int, folder: Path) -> None:
    """Render a page and see that it shows something and does not scroll sideways."""
    pixels = screenshot(page, width, folder)
    assert pixels.shape[1] == width
    assert len(np.unique(pixels[::4, ::4, 2])) > 50
    # Cards end before the window does: the last columns are the page's own background.
    assert np.ptp(pixels[:, -3:, :3]) < 0.02


def script_result(page: Path, script: str, folder: Path, width: int = 1280) -> str:
    """Run a script in a copy of a page that allows it, and return the title that it set."""
    copy = folder / "copy.html"
    html = page.read_text(encoding="utf-8")
    html = html.replace('<meta http-equiv="Content-Security-Policy"', '<meta name="was-policy"')
    copy.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    dumped = _chromium(copy, folder, [f"--window-size={width},1600", "--dump-dom"])
    return dumped.partition("<title>")[2].partition("</title>")[0]


def screenshot(page: Path, width: int, folder: Path) -> np.ndarray:
    """Render a page."""
    picture = folder / "picture.png"
    options = ["--hide-scrollbars", f"--window-size={width},1600", f"--screenshot={picture}"]
    _chromium(page, folder, options)
    return imread(picture)


def _chromium(page: Path, folder: Path, options: list[str]) -> str:
    """Open a page in headless Chromium with a profile of its own; return what it printed."""
    profile = folder / "profile"
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={profile}",
        *options,
        page.resolve().as_uri(),
    ]
    try:
        done = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True)
    finally:
        shutil.rmtree(profile, ignore_errors=True)
    return done.stdout
