"""``adarankgrad generate``: what it writes, from which folders, and what it refuses."""

import io
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from adarankgrad.generate.generate import generate_text
from adarankgrad.generate.request import GenerateRequest
from adarankgrad.train.errors import UserError
from adarankgrad.train.tokenizer import train_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "cli"))
from train_inputs import call  # noqa: E402

PROMPT = "the sea"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A LLaMA of one block and 128 positions with random weights, and a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the sea was calm and a whale rose"], 300, 128)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        # So that no random text ends early; a test of the end sets its own.
        bos_token_id=None,
        eos_token_id=None,
        # Logits of the order of 10: the likeliest token stands out, and others are drawn.
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(model_folder, tmp_path):
    """A copy of the model to change."""
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def write(folder, prompt=PROMPT, **options):
    return generate_text(GenerateRequest(folder, prompt, max_new_tokens=8, **options))


def likeliest(folder, prompt, num_tokens=8):
    """Take the likeliest next token again and again, without ``generate``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_by_default_it_takes_the_likeliest_token_each_time(model_folder):
    result = write(model_folder)
    assert result["text"] == likeliest(model_folder, PROMPT)
    assert result["num_new_tokens"] == 8
    assert result["finish"] == "length"


def test_the_command_prints_what_is_new_and_nothing_else(model_folder, capfd):
    flags = ("--model", str(model_folder), "--max-new-tokens", "8", "--device", "cpu")
    assert call("generate", *flags, "--prompt", PROMPT) == 0
    text = likeliest(model_folder, PROMPT)
    assert capfd.readouterr().out == text + "\n"
    assert call("generate", *flags, "--prompt", PROMPT, "--json") == 0
    result = json.loads(capfd.readouterr().out)
    assert result["text"] == text
    assert result["prompt"] == PROMPT


def test_a_prompt_can_come_from_standard_input(model_folder, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert call("generate", "--model", str(model_folder), "--prompt", "-", "--json") == 0
    assert json.loads(capfd.readouterr().out)["prompt"] == PROMPT


def test_a_seed_draws_the_same_text_again_and_another_seed_another(model_folder):
    texts = [write(model_folder, temperature=1.5, seed=seed)["text"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_from_next_to_no_probability_takes_the_likeliest_token(model_folder):
    sampled = write(model_folder, temperature=1.5, top_p=1e-6)["text"]
    assert sampled == write(model_folder)["text"]


def test_a_top_k_that_the_folder_suggests_is_not_used(model_folder, copied):
    path = copied / "generation_config.json"
    settings = json.loads(path.read_text()) | {"do_sample": True, "top_k": 1}
    path.write_text(json.dumps(settings))
    drawn = [write(folder, temperature=1.5)["text"] for folder in (copied, model_folder)]
    assert drawn[0] == drawn[1]


def test_a_folder_that_suggests_sampling_is_still_read_greedily(model_folder, copied):
    path = copied / "generation_config.json"
    settings = json.loads(path.read_text()) | {"do_sample": True, "temperature": 1.5}
    path.write_text(json.dumps(settings))
    assert write(copied)["text"] == write(model_folder)["text"]


def test_it_says_where_the_model_ended(model_folder, copied):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    first = int(model(ids).logits[0, -1].argmax())
    path = copied / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [first]}))
    result = write(copied)
    assert (result["finish"], result["num_new_tokens"]) == ("end", 1)


def test_a_run_stands_for_the_model_in_it(model_folder, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(model_folder, tmp_path / "run/model")
    assert write(tmp_path / "run")["text"] == write(model_folder)["text"]


def test_chat_puts_the_prompt_into_the_template(copied):
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(copied)
    asked = write(copied, chat=True)
    assert asked["text"] == write(copied, f"<user>{PROMPT}<assistant>")["text"]
    assert asked["prompt"] == PROMPT


@pytest.fixture
def adapter(model_folder, tmp_path):
    """A LoRA whose change of the model is as large as its weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["o_proj", "down_proj"], init_lora_weights=False
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "merged")
    return folder


def test_an_adapter_is_loaded_on_its_base_model(model_folder, adapter):
    text = write(adapter)["text"]
    assert text == write(adapter.parent / "merged")["text"]
    assert text != write(model_folder)["text"]


def test_an_adapter_is_read_without_a_word_of_peft(adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write(adapter)["num_new_tokens"] == 8


def test_an_adapter_of_another_task_is_refused(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UserError, match="adapter for SEQ_CLS, not for a causal"):
        write(adapter)


def test_an_adapter_without_base_model_or_tokenizer_is_refused(adapter):
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": "no/such-model"}
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no/such-model is not a folder.*save the tokenizer"):
        write(adapter)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("models/smollm2", "no folder here: fetch it with adarankgrad fetch-model smollm2"),
        ("owner/name", "model 'owner/name' is no folder here, and the hub cannot be asked"),
    ],
)
def test_an_adapter_whose_base_model_is_away_is_refused_at_once(base, said, adapter, model_folder):
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(UserError, match=said):
        write(adapter)


def test_an_adapter_of_a_model_of_another_shape_is_refused(adapter, copied):
    LlamaForCausalLM(
        LlamaConfig.from_pretrained(copied, hidden_size=16, intermediate_size=48)
    ).save_pretrained(copied)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": str(copied)}
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="adapter .* cannot be loaded"):
        write(adapter)


def test_a_masked_language_model_is_refused(tmp_path):
    BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a BertForMaskedLM, not a causal language model"):
        write(tmp_path)


@pytest.fixture
def own_code(copied, tmp_path, monkeypatch):
    """A model whose class stands in its folder and leaves a file when it is imported."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = copied / "config.json"
    settings = json.loads(path.read_text()) | {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    path.write_text(json.dumps(settings))
    (copied / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'was-run')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return copied


def test_code_of_a_folder_is_not_run_without_permission(own_code, tmp_path):
    with pytest.raises(UserError, match="needs code.*--trust-remote-code"):
        write(own_code)
    assert not (tmp_path / "was-run").exists()


def test_code_of_a_folder_is_run_with_permission(own_code, model_folder, tmp_path):
    text = write(own_code, trust_remote_code=True)["text"]
    assert (tmp_path / "was-run").exists()
    assert text == write(model_folder)["text"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "absent"), "there is no folder absent: name that of a model"),
        (("--model", "models/smollm2"), "fetch it with adarankgrad fetch-model smollm2"),
        (("--model", "empty"), "empty holds no model, neither config.json nor"),
        (("--prompt", ""), "the prompt is empty"),
        (("--chat",), "has no chat template: leave --chat out"),
        (("--max-new-tokens", "0"), "max_new_tokens = 0 must be at least 1"),
        (("--temperature", "-0.5"), "temperature = -0.5 must be 0"),
        (("--temperature", "nan"), "temperature = nan must be 0"),
        (("--temperature", "1", "--top-p", "0"), "top_p = 0 must lie in (0, 1]"),
        (("--top-p", "0.5"), "give a temperature above 0 as well"),
        (("--seed", "-1"), "seed = -1 must lie in"),
        (("--device", "abacus"), "device 'abacus' is unknown"),
        (("--max-new-tokens", "127"), "128 positions: lower --max-new-tokens to 126"),
        (("--prompt", "the sea " * 80), "the model's 128 positions: shorten the prompt"),
        (("--prompt", "caf\udce9"), "the prompt is not text in UTF-8"),
        (("--temprature", "1"), "--temprature"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    flags, message, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert call("generate", "--model", str(model_folder), "--prompt", PROMPT, *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"nothing")


def damaged_config(folder):
    (folder / "config.json").write_text("{")


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def another_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["whales"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "cannot be loaded"),
        (damaged_weights, "cannot be loaded"),
        (damaged_config, "config.json cannot be read"),
        (no_tokenizer, "holds no usable tokenizer"),
        (another_tokenizer, "they do not belong together"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(damage, message, copied):
    damage(copied)
    with pytest.raises(UserError, match=message) as error:
        write(copied, "the whales")
    assert str(copied) in str(error.value)
