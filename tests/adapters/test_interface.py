"""One shape for all adapters: what a command or a loop may count on."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

from adarankgrad import adapters
from adarankgrad.adapters import ADAPTERS, Adapter, StepHook, find_adapter

from .models import causal_loss, logits, tiny_llama, token_batch
from .training import Run

FUNCTIONS = ("apply", "param_groups", "step_hook", "export", "load")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_the_functions_of_the_shape_with_their_arguments(name):
    adapter = find_adapter(name)
    for function in FUNCTIONS:
        wanted = inspect.signature(getattr(Adapter, function)).parameters
        given = inspect.signature(getattr(adapter, function)).parameters
        extra = [given[each] for each in given if each not in wanted]
        assert [each for each in wanted if each != "self"] == list(given)[: len(wanted) - 1]
        assert all(each.default is not inspect.Parameter.empty for each in extra)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_configuration_has_defaults_and_documents_every_field(name):
    config_class = find_adapter(name).Config
    config_class()
    documentation = " ".join(
        each.__doc__ or "" for each in config_class.__mro__ if dataclasses.is_dataclass(each)
    )
    for field in dataclasses.fields(config_class):
        assert f"{field.name}:" in documentation


@pytest.mark.parametrize("name", ADAPTERS)
def test_defaults_train_save_state_for_weights_only_and_load_on_the_base(name, tmp_path):
    run = Run(name, tiny_llama(), find_adapter(name).Config(), num_steps=4).train(range(1, 5))
    assert isinstance(run.hook, StepHook)
    torch.save(run.state_dict(), tmp_path / "state.pt")
    run.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run.hook.remove()
    tuned = logits(run.model, token_batch())
    find_adapter(name).export(run.model, tmp_path / "adapter")
    loaded = find_adapter(name).load(tiny_llama(), tmp_path / "adapter")
    # SoRA's export folds the gates, to the 1e-5 that docs/sora.md promises; the others' is exact.
    tolerance = 1e-5 if name == "sora" else 0.0
    torch.testing.assert_close(logits(loaded, token_batch()), tuned, rtol=0, atol=tolerance)
    assert not torch.equal(tuned, logits(tiny_llama(), token_batch()))


@pytest.mark.parametrize("name", ["prilora", "sora"])
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_name_that_no_module_has_is_refused_beside_others_that_fit(name, setting):
    adapter = find_adapter(name)
    given = {"target_modules": ["q_proj", "k_proj"]} | {setting: ["k_proj", "model.v_prj"]}
    with pytest.raises(ValueError, match=f"{setting} names 'model.v_prj', and the model has no"):
        adapter.apply(tiny_llama(), adapter.Config(**given))


@pytest.mark.parametrize("name", ["prilora", "sora"])
def test_a_pattern_that_excludes_no_module_is_refused(name):
    adapter = find_adapter(name)
    with pytest.raises(ValueError, match="exclude_modules 'k_proj' matches no module's whole name"):
        adapter.apply(tiny_llama(), adapter.Config(exclude_modules="k_proj"))


@pytest.mark.parametrize("name", ["prilora", "sora"])
def test_a_pattern_excludes_the_modules_whose_whole_names_it_matches(name):
    adapter = find_adapter(name)
    adapted = adapter.apply(tiny_llama(), adapter.Config(exclude_modules=".*k_proj"))
    trained = [each for each, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained and not any("k_proj" in each for each in trained)


@pytest.mark.parametrize("names", ["lm_head", ["lm_head"]])
def test_a_module_to_save_may_be_named_alone(names):
    model = find_adapter("sora").apply(
        tiny_llama(), find_adapter("sora").Config(modules_to_save=names)
    )
    others = [
        name
        for name, each in model.named_parameters()
        if each.requires_grad and "lora_" not in name
    ]
    assert others == ["base_model.model.lm_head.modules_to_save.default.weight"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_runs_where_only_deterministic_algorithms_are_allowed(name):
    torch.use_deterministic_algorithms(True)
    try:
        Run(name, tiny_llama(), find_adapter(name).Config(), num_steps=2).train([1, 2])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ADAPTERS)
def test_half_precision_base_weights_are_trained_in_float32(name):
    adapter = find_adapter(name)
    model = adapter.apply(tiny_llama().to(torch.bfloat16), adapter.Config())
    groups = adapter.param_groups(model, adapter.Config(), lr=1e-3)
    trained = [param for group in groups for param in group["params"]]
    assert {param.dtype for param in trained} == {torch.float32}
    causal_loss(model, token_batch()).backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in trained)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_groups_hold_every_trainable_parameter_once(name):
    adapter = find_adapter(name)
    model = adapter.apply(tiny_llama(), adapter.Config())
    groups = adapter.param_groups(model, adapter.Config(), lr=1e-3, weight_decay=0.1)
    held = [id(param) for group in groups for param in group["params"]]
    trainable = {id(param) for param in model.parameters() if param.requires_grad}
    assert len(held) == len(trainable) and set(held) == trainable


def test_an_unknown_adapter_is_refused():
    with pytest.raises(ValueError, match="adapter must be one of prilora, sora, sara, got 'dora'"):
        find_adapter("dora")


def test_all_names_can_be_had_from_the_package():
    assert all(hasattr(adapters, name) for name in adapters.__all__)
    with pytest.raises(AttributeError, match="no attribute 'dora'"):
        adapters.dora  # noqa: B018


def test_the_package_and_sara_need_neither_peft_nor_transformers():
    script = (
        "import sys\n"
        "sys.modules['peft'] = sys.modules['transformers'] = None\n"
        "from adarankgrad.adapters import SaRAConfig, find_adapter, sara\n"
        "try:\n"
        "    find_adapter('sora')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert "pip install 'adarankgrad[finetune]'" in result.stdout
