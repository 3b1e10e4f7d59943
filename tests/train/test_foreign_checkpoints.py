"""A checkpoint of another run, version or model is refused by name, before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from adarankgrad.train import TrainConfig, UserError, train
from adarankgrad.train.display import Display
from adarankgrad.train.files import seal_folder


def train_here(settings, **options):
    return train(TrainConfig.from_settings(settings), **options)


@pytest.fixture(scope="module")
def finished_runs(inputs, tmp_path_factory):
    """Two runs of six steps with checkpoints at 2, 4 and 6; they differ in the optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
        patch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
        for optimizer in ("adarankgrad", "galore"):
            settings = {
                "data": str(inputs / "text.txt"),
                "model": str(inputs / "tiny" / "config.json"),
                "output": str(folder / optimizer),
                "optimizer": optimizer,
                "steps": 6,
                "batch_size": 2,
                "seq_len": 16,
                "eval_every": 6,
                "save_every": 2,
                "keep_checkpoints": 3,
                "device": "cpu",
            }
            train_here(settings)
    return folder


@pytest.fixture
def run_dir(finished_runs, tmp_path):
    return shutil.copytree(finished_runs / "adarankgrad", tmp_path / "run")


def newest(run_dir):
    return run_dir / "checkpoints" / "checkpoint-6"


def resume(run_dir):
    from adarankgrad.train.settings import settings_to_resume

    return train_here(
        {**settings_to_resume(run_dir, {}, TrainConfig), "output": str(run_dir)}, resume=True
    )


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(run_dir, match):
    before = content_of(run_dir)
    with pytest.raises(UserError, match=match):
        resume(run_dir)
    assert content_of(run_dir) == before


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ('"adarankgrad"', '"galore"', "written with optimizer = 'adarankgrad'.* says 'galore'"),
        ("tiny/config.json", "other/config.json", "written with model = '.*tiny.*other"),
        ("seed = 0", "seed = 1", "written with seed = 0, and the run's config.toml says 1"),
        ("seq_len = 16", "seq_len = 16\nmax_rank = 4", "written with no max_rank, .* says 4"),
        ("steps = 6", "steps = 8", "written with steps = 6, and .* says 8"),
    ],
)
def test_a_run_whose_settings_were_edited_is_refused(run_dir, before, after, match):
    path = run_dir / "config.toml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert_refused(run_dir, f"checkpoint-6: it was {match}")


def test_a_checkpoint_of_another_run_is_refused(run_dir, finished_runs):
    shutil.rmtree(newest(run_dir))
    shutil.copytree(newest(finished_runs / "galore"), newest(run_dir))
    assert_refused(run_dir, "checkpoint-6: it was written with optimizer = 'galore'")


@pytest.mark.parametrize(
    ("version", "advice"), [(9, "update adarankgrad"), (1, "an older one; resume with that one")]
)
def test_a_checkpoint_of_another_version_is_refused(run_dir, version, advice):
    path = newest(run_dir) / "session.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version}))
    seal_folder(newest(run_dir))
    assert_refused(run_dir, f"session.json has format version {version}, .* {advice}")


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run_dir):
    newest(run_dir).rename(newest(run_dir).with_name("checkpoint-8"))
    assert_refused(run_dir, "checkpoint-8/session.json is of step 6, not 8")


def change_version(saved):
    saved["param_groups"][0]["state_version"] += 1


def change_shape(saved):
    state = saved["state"][0]
    state["basis"] = state["basis"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "match"),
    [(change_version, "saved by a newer one"), (change_shape, r"of another optimizer, shape")],
)
def test_a_state_that_does_not_fit_is_refused_with_its_file(run_dir, change, match):
    path = newest(run_dir) / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    seal_folder(newest(run_dir))
    with pytest.raises(UserError, match=f"checkpoint-6/optimizer.pt does not fit .*{match}"):
        resume(run_dir)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "session.json"])
def test_damage_in_every_checkpoint_is_told_of_each_file(run_dir, damage, name):
    for folder in (run_dir / "checkpoints").iterdir():
        damage(folder / name)
    fault = f"{name} has " if damage is truncate else f"checksum of {name}"
    assert_refused(run_dir, f"every checkpoint is corrupt.*checkpoint-6: .*{fault}.*checkpoint-2")


def test_damaged_tokens_are_refused(run_dir):
    flip_a_bit(run_dir / "tokens" / "train.npy")
    assert_refused(run_dir, "tokens are damaged|the tokens in .* are damaged")


def test_a_run_stopped_before_its_settings_were_saved_needs_them_again(run_dir):
    (run_dir / "config.toml").unlink()
    from adarankgrad.train.settings import settings_to_resume

    with pytest.raises(UserError, match="stopped before its settings were saved.*--overwrite"):
        settings_to_resume(run_dir, {"output": str(run_dir)}, TrainConfig)


def test_a_run_without_a_checkpoint_starts_from_the_beginning(run_dir, monkeypatch):
    monkeypatch.setattr("adarankgrad.train.plots.write_plots", lambda run_dir: [])
    monkeypatch.setattr("adarankgrad.train.report.write_report", lambda run_dir: run_dir)
    said = []
    monkeypatch.setattr(Display, "say", lambda self, line: said.append(line))
    shutil.rmtree(run_dir / "checkpoints")
    assert resume(run_dir)["steps"] == 6
    assert "the run was stopped before its first checkpoint: starting from the beginning" in said
