"""The page of a comparison, on run folders that were never trained: what it says."""

import json
import re
from html import unescape

import pytest
from browser import NEEDS_CHROMIUM, assert_fits, script_result
from fake_run import write_fake_run
from pictures import same_picture

from adarankgrad.cli.options import parse_flags
from adarankgrad.compare import figures, plots
from adarankgrad.compare.plan import Cell, make_plan
from adarankgrad.compare.report import results_table, write_results
from adarankgrad.compare.results import collect
from adarankgrad.train.config import TrainConfig
from adarankgrad.train.values import read_toml_table

MANY = {
    "AdamW": "adamw",
    "AdamW 8-bit": "torchao.optim.AdamW8bit",
    "Muon": "torch.optim.Muon",
    "GaLore": "galore",
    "APOLLO": "apollo_torch.APOLLOAdamW",
    "Orthogonalized SGD": "orthogonalized-sgd",
    "AdaRankGrad (published)": "adarankgrad-published",
    "AdaRankGrad, budget 0.1": "adarankgrad",
}
LAST_SEED_OF_GALORE = "galore/lr-0.001_plain-0.008_seed-2"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write a comparison whose runs are all there, but for those in ``failed``."""
    monkeypatch.setattr(plots, "to_png", same_picture)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words")

    def build(methods=None, failed=(), lrs=(1e-3, 4e-3), seeds=(0, 1, 2), plain_lrs=(8e-3,)):
        tables = {
            label: {"optimizer": name} for label, name in (methods or {"AdamW": "adamw"}).items()
        }
        grids = {"lrs": list(lrs), "plain_lrs": list(plain_lrs), "seeds": list(seeds)}
        settings = {"data": "text.txt", "steps": 120, "methods": tables, **grids}
        plan = make_plan(tmp_path / "cmp", settings)
        for place, method in enumerate(plan.methods):
            for lr, plain_lr in method.rates:
                for seed in seeds:
                    loss = 3.0 + place / 50 + 4e-3 * seed + lr
                    write_cell(plan, Cell(method, lr, plain_lr, seed), loss, failed)
        return plan

    return build


def write_cell(plan, cell, loss, failed):
    folder = plan.run_dir(cell)
    if any(part in f"{cell.method.label} {cell.name}" for part in failed):
        folder.parent.mkdir(parents=True, exist_ok=True)
        failure = {"status": "failed", "val_loss": None, "message": "no memory <left>."}
        folder.with_name(folder.name + ".failure.json").write_text(json.dumps(failure))
        return
    write_fake_run(folder, cell.method.settings["optimizer"], val_loss=loss)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"num_threads": 3, "commit": "c0ffee" * 4}))


def page_of(plan):
    return (plan.output / "report.html").read_text(encoding="utf-8")


def texts_of(html, tag):
    return [
        re.sub("<[^>]*>", " ", part).strip()
        for part in re.findall(f"<{tag}[ >].*?</{tag}>", html, re.DOTALL)
    ]


def test_a_failing_plot_is_named_and_keeps_neither_page_nor_other_plots_away(make, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("nothing to <draw>")

    monkeypatch.setattr(plots, "validation_figure", fail)
    plan = make()
    write_results(plan)
    assert "ValueError: nothing to &lt;draw&gt;" in page_of(plan)
    names = {path.name for path in (plan.output / "plots").iterdir()}
    assert names == {"trade_off.png", "rates.png"}


def test_plots_of_an_earlier_state_are_removed_and_other_files_kept(make):
    plan = make({"AdaRankGrad": "adarankgrad"})
    write_results(plan)
    folder = plan.output / "plots"
    assert (folder / "ranks_adarankgrad.png").exists()
    (folder / "ranks_gone.png").write_text("stale")
    (folder / "mine.png").write_text("keep")
    write_results(plan)
    names = {path.name for path in folder.iterdir()}
    assert "ranks_gone.png" not in names
    assert {"mine.png", "ranks_adarankgrad.png"} <= names


def test_a_mean_over_fewer_seeds_says_so_and_wins_nothing(make):
    plan = make({"GaLore": "galore", "AdamW": "adamw"}, failed=[LAST_SEED_OF_GALORE])
    galore, adamw = write_results(plan)["methods"]
    assert galore["val_loss"]["mean"] < adamw["val_loss"]["mean"]
    assert (galore["is_complete"], adamw["is_complete"]) == (False, True)
    html = page_of(plan)
    assert "2 of 3 seeds" in html
    assert "a result on every seed (1 without): AdamW" in html
    assert "GaLore, lr 0.001, plain lr 0.008, seed 2" in html
    assert "2 of 3 seeds" in "".join(map(str, results_table(plan).columns[1].cells))


def test_what_a_failing_method_said_is_in_sight(make):
    plan = make({"GaLore": "galore", "AdamW": "adamw"}, failed=["GaLore"])
    write_results(plan)
    html = re.sub("<details>.*?</details>", "", page_of(plan), flags=re.DOTALL)
    assert "failed: no memory &lt;left&gt;." in html


def test_without_any_result_there_is_a_page_all_the_same(make):
    plan = make(failed=["AdamW"])
    results = write_results(plan)
    assert results["methods"][0]["val_loss"]["mean"] is None
    assert json.loads((plan.output / "results.json").read_text()) == results
    assert "failed: no memory &lt;left&gt;." in page_of(plan)


def test_rows_are_in_order_of_loss_with_those_that_have_none_last(make):
    plan = make({"Fira": "fira", "GaLore": "galore", "AdamW": "adamw"}, failed=["Fira"])
    write_results(plan)
    rows = texts_of(page_of(plan).partition("Run it again")[0], "tr")
    assert [row.split()[0] for row in rows[1:4]] == ["GaLore", "AdamW", "Fira"]
    assert 'aria-sort="ascending"><button>Validation loss' in page_of(plan)


def test_the_state_at_the_end_its_mean_and_its_highest_are_told_apart(make):
    plan = make({"AdaRankGrad": "adarankgrad"}, lrs=[1e-3], seeds=[0])
    (result,) = collect(plan)
    plain = result.plain_state_bytes
    for size, row in zip((9_000_000, 7_000_000), result.first_run.train, strict=False):
        row["state_bytes"] = plain + size
    del result.first_run.train[2:]
    assert result.highest_projected_state_bytes == 9_000_000
    assert result.mean_projected_state_bytes == 8_000_000
    write_results(plan)
    headers = texts_of(page_of(plan), "th")
    assert {"State at the end", "Highest state"} <= set(headers)
    assert "Peak memory on a CPU is that of the whole process" in page_of(plan)


@pytest.mark.parametrize(
    ("lrs", "plain_lrs", "doubts"),
    [
        ((1e-3,), (8e-3,), {"lr": "one tried", "plain_lr": "one tried"}),
        ((1e-3, 4e-3), (8e-3,), {"lr": "at edge", "plain_lr": "one tried"}),
        ((1e-3, 4e-3), (8e-3, 4e-3), {"lr": "at edge", "plain_lr": "at edge"}),
    ],
)
def test_a_rate_without_alternatives_on_both_sides_is_doubted(make, lrs, plain_lrs, doubts):
    plan = make(lrs=lrs, plain_lrs=plain_lrs, seeds=[0])
    (result,) = write_results(plan)["methods"]
    assert result["doubts"] == doubts
    assert result["is_at_edge_of_grid"] == ("at edge" in doubts.values())
    assert all(doubt in page_of(plan) for doubt in doubts.values())


def test_the_toml_on_the_page_makes_the_same_comparison_from_another_directory(
    make, tmp_path, monkeypatch
):
    plan = make({"AdamW": "adamw", 'a "b"': "adarankgrad"})
    arguments = {"betas": (0.9, 0.99), "group": {"a": 1}}
    plan.methods[1].settings.update(energy=0.9, optimizer_args=arguments)
    write_results(plan)
    (text,) = re.findall("<pre[^>]*>(data = [^<]*)</pre>", page_of(plan))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "comparison.toml").write_text(unescape(text))
    again = make_plan(plan.output, read_toml_table(tmp_path / "comparison.toml"))
    assert again.methods == plan.methods
    assert again.seeds == plan.seeds
    assert again.shared == {**plan.shared, "data": str(tmp_path / "text.txt")}


def test_the_command_of_a_method_reads_the_same_from_anywhere_and_writes_afresh(make, tmp_path):
    plan = make()
    plan.tokenizer_dir.mkdir()
    flags = write_results(plan)["methods"][0]["command"][2:]
    names = [name.removeprefix("--").replace("-", "_") for name in flags[::2]]
    texts = dict(zip(names, flags[1::2], strict=True))
    config = TrainConfig.from_settings(parse_flags(texts, TrainConfig))
    assert config.data == str(tmp_path / "text.txt")
    assert config.tokenizer == str(plan.tokenizer_dir)
    assert not (tmp_path / config.output).exists()
    assert (config.lr, config.plain_lr, config.steps) == (1e-3, 8e-3, 120)


def test_versions_of_other_packages_device_threads_and_workers_are_told(make):
    plan = make({"Apollo": "numpy.APOLLO"}, seeds=[0])
    environment = write_results(plan, workers=2)["environment"]
    assert "numpy" in environment["versions"]
    assert environment["device"] == ["cpu"]
    assert environment["num_threads"] == [3]
    assert environment["workers"] == 2
    facts = texts_of(page_of(plan), "dt")
    assert {"numpy", "device", "threads a run", "runs at a time"} <= set(facts)


def test_one_method_has_a_page_about_its_rates(make):
    plan = make({"GaLore": "galore"}, lrs=[1e-3, 2e-3, 4e-3], seeds=[0])
    write_results(plan)
    html = page_of(plan)
    assert "<title>GaLore at 3 learning rates</title>" in html
    assert "<details open>" in html
    (axes,) = figures.rates_figure(collect(plan), "caption").axes
    line, chosen = axes.get_lines()
    assert list(line.get_xdata()) == [1e-3, 2e-3, 4e-3]
    assert list(chosen.get_xdata()) == [1e-3]


@NEEDS_CHROMIUM
def test_the_table_of_many_methods_fits_a_desktop_and_scrolls_in_its_box_on_a_phone(make, tmp_path):
    plan = make(MANY, failed=[LAST_SEED_OF_GALORE])
    write_results(plan)
    html = plan.output / "report.html"
    for width in (390, 1280, 1440):
        assert_fits(html, width, tmp_path)
    script = """
      const box = document.querySelector(".sortable").parentElement;
      document.title = [innerWidth, box.scrollWidth, box.clientWidth].join(" ");
    """
    for width in (1280, 1440):
        window, needed, there = map(int, script_result(html, script, tmp_path, width).split())
        assert window == width
        assert needed <= there
