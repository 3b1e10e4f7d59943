"""The report and the comparison: self-contained, escaped, readable, true to the run's files."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from browser import NEEDS_CHROMIUM, WINDOW_WIDTHS, assert_fits
from fake_run import write_fake_run
from rich.console import Console

from adarankgrad.train.comparison import _caption, comparison_table, write_comparison
from adarankgrad.train.display import summary_table
from adarankgrad.train.errors import UserError
from adarankgrad.train.record import load_run
from adarankgrad.train.report import _opening, write_report

VOID_TAGS = {"meta", "img", "source", "br", "link", "input"}


class Page(HTMLParser):
    """Collects text and references, and checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "srcset", "href", "action")]

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(write_fake_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    runs = {
        "AdamW": write_fake_run(folder / "adamw", "adamw"),
        "AdaRankGrad": write_fake_run(folder / "adarankgrad", val_loss=3.36, perplexity=28.8),
    }
    (runs["AdamW"] / "report.html").write_text("there")
    return write_comparison(runs, folder, "Two runs & more")


def test_a_report_needs_nothing_outside_itself(report):
    html = report.read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.references) == 6  # three figures, light and dark
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http:" not in html and "https:" not in html and "url(" not in html
    assert not {"script", "link", "iframe"} & set(page.tags)
    for reference in page.references:
        assert base64.b64decode(reference.split(",", 1)[1]).startswith(b"\x89PNG")


def test_a_report_adapts_to_phones_and_to_dark_mode(report):
    html = report.read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "@media (prefers-color-scheme: dark)" in html and "@media (max-width" in html


def test_a_report_says_what_the_run_measured(report):
    summary = json.loads((report.parent / "summary.json").read_text())
    text = Page(report.read_text(encoding="utf-8")).text
    assert f"{summary['val_loss']:.3f}" in text
    assert f"{summary['mean_rank']:.1f}" in text
    assert "0.820 MiB" in text and "14 % of AdamW's 6.00 MiB" in text
    assert "774 MiB" in text and "process resident set" in text
    assert "0.q_proj" in text and "1.down_proj" in text and "max_gap" in text
    assert "the longest gap between refreshes was over (12 of 14 weights)" in text
    assert "torch" in text and "2.13.0" in text and "optimizer_args.energy" in text


def test_text_from_the_run_cannot_become_markup(report):
    html = report.read_text(encoding="utf-8")
    assert "&#x27;a $b &lt;c&gt;.txt&#x27;" in html
    assert "<c>" not in html


def test_hostile_names_and_settings_are_escaped_everywhere(tmp_path):
    hostile = "<script>alert('x')</script>\"&"
    run_dir = write_fake_run(tmp_path / "a<b>&run", num_logs=1)
    summary = json.loads((run_dir / "summary.json").read_text())
    summary |= {"optimizer": hostile, "peak_bytes_source": hostile}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    info = dict.fromkeys(["commit", "device", "dtype", "created", "describe"], hostile)
    info |= {"command": [hostile], "versions": {hostile: hostile}, "model_parameters": 5}
    (run_dir / "run.json").write_text(json.dumps(info))
    (run_dir / "config.toml").write_text(f"data = '''{hostile}'''\n")
    ranks = json.loads((run_dir / "ranks.jsonl").read_text())
    for layer in ranks["layers"]:
        layer["name"] = hostile + layer["name"]
        layer["refresh_reason"] = hostile
    (run_dir / "ranks.jsonl").write_text(json.dumps(ranks) + "\n")
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "script" not in page.tags and "b" in page.tags
    assert "<script>alert('x')</script>" in page.text


def test_a_report_of_adamw_leaves_ranks_out(tmp_path):
    page = Page(write_report(write_fake_run(tmp_path / "run", "adamw")).read_text("utf-8"))
    assert len(page.references) == 4
    assert "Mean rank" not in page.text and "Layers at the end" not in page.text
    assert "of projected weights" not in page.text and "of every weight" in page.text


def state_rows(run_dir):
    table = summary_table(json.loads((run_dir / "summary.json").read_text()))
    names, values = (list(column.cells) for column in table.columns)
    start, end = (
        names.index("skipped steps") + 1,
        next(i for i, n in enumerate(names) if "peak" in n),
    )
    return dict(zip(names[start:end], values[start:end], strict=True))


def test_only_a_run_that_projects_says_what_its_projected_weights_hold(tmp_path):
    projects = state_rows(write_fake_run(tmp_path / "adarankgrad"))
    assert projects == {
        "optimizer state": "8.83 MiB",
        "  of projected weights": "840 KiB",
        "  as a share of AdamW's": "13.7 %",
        "mean rank": projects["mean rank"],
    }
    adamw = write_fake_run(tmp_path / "adamw", "adamw")
    assert state_rows(adamw) == {"optimizer state": "14.0 MiB"}


def test_a_run_that_trains_few_weights_says_how_many(tmp_path):
    numbers = {"trainable_parameters": 340_000, "base_parameters": 22_700_000}
    run_dir = write_fake_run(tmp_path / "run", "adamw", **numbers)
    assert state_rows(run_dir)["trained weights"] == "340 k (1.5 %)"
    text = Page(write_report(run_dir).read_text("utf-8")).text
    assert "of 340 k trained weights, 1.5 % of the model's" in text


def test_a_report_tells_of_skipped_steps_where_there_were_some(tmp_path):
    run = write_fake_run(tmp_path / "run", num_logs=1, skipped_steps=2)
    assert "2 steps were skipped" in _opening(load_run(run))
    assert "skipped" not in _opening(load_run(write_fake_run(tmp_path / "other", num_logs=1)))


def test_a_report_of_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="summary.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_table_puts_runs_side_by_side(tmp_path):
    runs = {
        "AdamW": write_fake_run(tmp_path / "adamw", "adamw", val_loss=3.30),
        "AdaRankGrad": write_fake_run(tmp_path / "adarankgrad", val_loss=3.36),
    }
    console = Console(width=100, record=True, file=open("/dev/null", "w", encoding="utf-8"))
    with console.file:
        console.print(comparison_table(runs))
    rows = {
        cells[0]: cells[1:]
        for line in console.export_text().splitlines()
        if len(cells := [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]) == 4
    }
    assert rows[""] == ["AdamW", "AdaRankGrad", "change"]
    assert rows["Validation loss"] == ["3.300", "3.360", "+0.060"]
    assert rows["State of projected weights"] == ["6.00 MiB", "0.820 MiB", "x 0.14"]
    assert rows["Mean rank, first log"] == ["n/a", "22.9", ""]
    assert {
        "Perplexity",
        "Optimizer state in all",
        "Mean rank, last log",
        "Peak memory",
        "Tokens per second",
        "Time in the optimizer",
    } <= set(rows)


def test_a_comparison_holds_table_plots_ranks_and_commands(comparison):
    page = Page(comparison.read_text(encoding="utf-8"))
    links = [r for r in page.references if not r.startswith("data:image/png;base64,")]
    assert links == ["adamw/report.html"]  # the other run has none
    assert len(page.references) == 6 + 1
    assert "Two runs & more" in page.text and "x 0.14" in page.text
    assert "--optimizer adamw" in page.text and "--optimizer adarankgrad" in page.text
    assert sorted(p.name for p in (comparison.parent / "plots").iterdir()) == [
        "loss.png",
        "memory.png",
    ]


def test_the_caption_of_a_comparison_says_what_differs_and_what_is_shared(tmp_path):
    runs = {
        name: load_run(write_fake_run(tmp_path / name, name, num_logs=1))
        for name in ("adamw", "adarankgrad")
    }
    assert _caption(runs) == (
        "adamw: --optimizer adamw; adarankgrad: --optimizer adarankgrad; "
        "adarankgrad train --data 'a $b <c>.txt'"
    )


def test_a_comparison_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one run folder"):
        write_comparison({}, tmp_path / "out", "nothing")
    with pytest.raises(UserError, match="not a finished run"):
        comparison_table({"a": tmp_path})
    assert list(tmp_path.iterdir()) == []


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", WINDOW_WIDTHS)
@pytest.mark.parametrize("which", ["report", "comparison"])
def test_a_browser_shows_the_page_without_scrolling_sideways(which, width, tmp_path, request):
    assert_fits(request.getfixturevalue(which), width, tmp_path)
