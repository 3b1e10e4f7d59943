"""Names on the hub are told from paths, and a hub that is away is asked once."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

from adarankgrad.train import UserError
from adarankgrad.train.hub import ask_for_dataset, ask_for_model, is_hub_name


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers as it is told, and notes what it was asked for."""

    class Hub(list):
        error = None

        def head(self, url, *, timeout):
            # What a person waits without a word.
            assert timeout <= 5
            self.append(url)
            if self.error is not None:
                raise self.error

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub.head)
    for function in (ask_for_model, ask_for_dataset):
        function.cache_clear()
    yield hub
    for function in (ask_for_model, ask_for_dataset):
        function.cache_clear()


def refusal(kind):
    return kind("not there", response=SimpleNamespace(headers={}, request=None))


def test_a_model_is_asked_for_once(hub):
    assert ask_for_model("owner/name") and ask_for_model("owner/name")
    assert hub == ["https://huggingface.co/owner/name/resolve/main/config.json"]


def test_a_repository_without_the_file_is_left_to_what_downloads(hub):
    hub.error = refusal(RemoteEntryNotFoundError)
    assert ask_for_dataset("owner/name")


@pytest.mark.parametrize("ask", [ask_for_model, ask_for_dataset])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refusal(RepositoryNotFoundError), "the hub has none of that name that you may read"),
        (TimeoutError("no answer"), r"the hub cannot be asked for it \(no answer\)"),
    ],
)
def test_what_is_neither_here_nor_on_the_hub_is_refused(ask, error, said, hub):
    hub.error = error
    with pytest.raises(UserError, match=said):
        ask("owner/name")


def test_a_copy_in_the_cache_does_where_the_hub_is_away(hub, monkeypatch, tmp_path):
    hub.error = TimeoutError("no answer")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "owner___name").mkdir()
    assert not ask_for_model("owner/name")
    assert not ask_for_dataset("owner/Name")


@pytest.mark.parametrize("name", ["owner/name", "name", "google-bert/bert.base_2"])
def test_a_name_without_a_folder_of_its_owner_may_be_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["./name", "/name", "~/name", "a/b/c", "models/name", "here/name", "a/", ""]
)
def test_a_path_is_no_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not is_hub_name(name)
