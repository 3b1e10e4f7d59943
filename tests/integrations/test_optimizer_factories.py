"""Trainer builds each of our optimizers from its model and arguments, by one argument."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from adarankgrad.integrations.transformers import (
    AdaGradNormFactory,
    AdaRankGradFactory,
    FiraFactory,
    GaLoreFactory,
    LowMemoryAdaRankGradFactory,
    OrthogonalizedSGDFactory,
    PublishedAdaRankGradFactory,
)
from adarankgrad.train.values import parse_arguments

from .conftest import CONFIG

FACTORIES = {
    AdaRankGradFactory: {"max_rank": 6},
    LowMemoryAdaRankGradFactory: {"max_rank": 6, "weight_rounding": "nearest"},
    PublishedAdaRankGradFactory: {"max_rank": 6},
    GaLoreFactory: {"rank": 6},
    FiraFactory: {"rank": 6, "residual": "official"},
    OrthogonalizedSGDFactory: {},
    AdaGradNormFactory: {"initial_sum": 1.0},
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def arguments(folder="unused", **settings):
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **settings,
        },
    )


def names_in(optimizer, **wanted):
    return {
        name
        for group in optimizer.param_groups
        if all(group[option] == value for option, value in wanted.items())
        for name in group["param_names"]
    }


EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.method)
def test_a_trainer_trains_with_each_factory(factory, model, sequences, tmp_path):
    args = arguments(tmp_path, learning_rate=1e-2)
    choice = (factory, {"training_args": args, **FACTORIES[factory]})
    start = {name: param.clone() for name, param in model.named_parameters()}
    trainer = Trainer(model, args, train_dataset=sequences, optimizer_cls_and_kwargs=choice)
    assert trainer.train().global_step == 2
    for name, param in model.named_parameters():
        assert not torch.equal(param, start[name]), name
    optimizer = trainer.optimizer.optimizer
    if factory is AdaGradNormFactory:
        assert optimizer.sum_of_squares > 1.0
        return
    report = optimizer.report()
    assert {layer.name for layer in report.layers} == {
        f"model.layers.{index}.{layer}_proj.weight"
        for index in range(2)
        for layer in ("mlp.up", "mlp.gate", "mlp.down", *(f"self_attn.{part}" for part in "qkvo"))
    } | (EMBEDDINGS if factory is LowMemoryAdaRankGradFactory else set())


def test_settings_of_the_trainer_are_honoured(model):
    args = arguments(
        learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1
    )
    optimizer = AdaRankGradFactory()(model, args, plain_lr=1e-3)
    for group in optimizer.param_groups:
        assert group["lr"] == (3e-3 if group["project"] else 1e-3)
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_settings_that_an_optimizer_without_projection_has_are_honoured(model):
    args = arguments(
        learning_rate=3e-3, adam_beta1=0.8, weight_decay=0.1, optim_args="initial_sum=2.0"
    )
    optimizer = AdaGradNormFactory()(model, args, device_mesh=None)
    assert optimizer.sum_of_squares == 2.0
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"betas": (0.9, 0.95)}, {}),
        ({"include": "q_proj"}, {}),
        ({}, {"optim_target_modules": "all-linear"}),
        ({}, {"optim_args": "eps=1e-6"}),
    ],
    ids=str,
)
def test_an_optimizer_without_projection_takes_nothing_that_it_has_not(model, options, settings):
    with pytest.raises(ValueError, match="unknown option of AdaGradNormFactory"):
        AdaGradNormFactory()(model, arguments(**settings), **options)


class Odd(nn.Module):
    """Weights that Trainer and `param_groups` would decay differently."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.bias_table = nn.Linear(16, 16)  # Trainer goes by the name
        self.log_decay = nn.Parameter(torch.zeros(16))


@pytest.mark.parametrize("build", [lambda: LlamaForCausalLM(CONFIG), Odd], ids=["llama", "odd"])
def test_weights_are_decayed_as_by_the_trainer(build):
    model = build()
    args = arguments(weight_decay=0.1)
    optimizer = AdaRankGradFactory()(model, args)
    expected = Trainer(model, args).create_optimizer()
    numbers = {
        param: group["weight_decay"] for group in expected.param_groups for param in group["params"]
    }
    ours = {
        param: group["weight_decay"]
        for group in optimizer.param_groups
        for param in group["params"]
    }
    assert ours == numbers


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ("all-linear", ["q", "k", "v", "o", "gate", "up", "down"]),
        ("all_linear", ["q", "k", "v", "o", "gate", "up", "down"]),
        (["q_proj", "mlp.up"], ["q", "up"]),
        (r".*\.(v|down)_proj", ["v", "down"]),
        ("['q_proj']", ["q"]),
        (["embed_tokens", "lm_head", "k_proj"], ["k"]),
    ],
    ids=str,
)
def test_target_modules_choose_among_the_projected_weights(model, targets, parts):
    optimizer = AdaRankGradFactory()(model, lr=1e-3, optim_target_modules=targets)
    projected = names_in(optimizer, project=True)
    assert {name.split(".")[-2].removesuffix("_proj") for name in projected} == set(parts)
    assert (
        names_in(AdaRankGradFactory()(model, arguments(optim_target_modules=targets)), project=True)
        == projected
    )


def test_fused_experts_are_projected_and_can_be_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 24))
            self.down_proj = nn.Parameter(torch.zeros(4, 24, 16))

    model = nn.ModuleDict({"experts": Experts(), "router": nn.Linear(16, 16)})
    every = AdaRankGradFactory()(model, lr=1e-3)
    assert names_in(every, stacked=True, project=True) == {
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    for targets in (["experts"], ["experts.gate_up_proj"]):
        optimizer = AdaRankGradFactory()(model, lr=1e-3, optim_target_modules=targets)
        assert "router.weight" in names_in(optimizer, project=False)
        assert "experts.gate_up_proj" in names_in(optimizer, stacked=True, project=True)


def test_commas_in_brackets_and_quotes_belong_to_a_value(model):
    args = arguments(
        optim_args="betas=(0.8, 0.95), max_rank=6, residual=none, "
        "include=['layers.0.*q_proj', \"layers.1.*(k|v)_proj\"], exclude='a,b=|k_proj'"
    )
    optimizer = AdaRankGradFactory()(model, args)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["max_rank"], group["residual"]) == ((0.8, 0.95), 6, "none")
    assert names_in(optimizer, project=True) == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    }


def test_optim_args_are_read_as_optimizer_args_of_train_are(model):
    text = "memory_budget='1MiB',monotone=True,residual=none"
    group = AdaRankGradFactory()(model, arguments(optim_args=text)).param_groups[0]
    read = parse_arguments(text)
    assert read == {"memory_budget": "1MiB", "monotone": True, "residual": "none"}
    assert {name: group[name] for name in read} == read


def test_arguments_come_as_axolotl_passes_them(model):
    args = arguments(optim_args="power_iterations=2, residual=none")
    passed = {
        "lr": "2e-3",
        "weight_decay": 0.0,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "device_mesh": None,
        "max_rank": "0.5",
        "monotone": "True",
        "refresh_norm": "None",
        "residual": "normalized",
        "memory_budget": "1MiB",
    }
    optimizer = AdaRankGradFactory()(model, args, **passed)
    group = optimizer.param_groups[0]
    expected = {
        "lr": 2e-3,
        "max_rank": 0.5,
        "monotone": True,
        "refresh_norm": None,
        "residual": "normalized",
        "memory_budget": "1MiB",
        "power_iterations": 2,
    }
    assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (
            {"lr": 1e-3, "max_rnk": 4},
            None,
            r"option of AdaRankGradFactory 'max_rnk': did you mean max_rank",
        ),
        ({"max_rank": 4}, None, r'no learning rate, .*\{"training_args": args\}'),
        ({"lr": "fast"}, None, r"lr must be .* 'fast'"),
        ({}, {"optim_args": "rank"}, r"^optim_args 'rank' cannot be read: write name=value"),
        ({}, {"optim_args": "betas=(0.9,0.95"}, r"^optim_args 'betas=\(0.9,0.95' cannot be read"),
        ({}, {"optim_args": "memory_budget=1MiB"}, r"^optim_args 'memory_budget=1MiB' cannot be"),
        ({}, {"optim_args": "rank=4"}, r"unknown option of AdaRankGradFactory 'rank'"),
        ({}, {"embedding_lr": 1e-4}, r"embedding_lr = 0.0001 is not honoured .* plain_lr"),
        ({}, {"optim_target_modules": ["qq"]}, r"\['qq'\] matches none of .*q_proj\.weight"),
        ({}, {"optim_target_modules": ["q_proj", "k_prj"]}, r"names 'k_prj', which no module"),
        ({"include": "q_proj"}, {"optim_target_modules": "all-linear"}, r"both choose .* give one"),
        ({"smallest_side": 100}, {}, r"worth projecting, so adarankgrad would be plain AdamW"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(model, options, settings, message):
    args = None
    if settings is not None:
        own = {name: value for name, value in settings.items() if name != "embedding_lr"}
        args = arguments(**own)
        args.embedding_lr = settings.get("embedding_lr")  # a field of Axolotl's arguments
    with pytest.raises(ValueError, match=message):
        AdaRankGradFactory()(model, args, **options)


def with_lora(model, **settings):
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **settings))


def test_adapters_are_trained_and_the_base_stays(model, sequences, tmp_path):
    peft_model = with_lora(model, modules_to_save=["lm_head"])
    args = arguments(tmp_path, learning_rate=1e-2)
    choice = (AdaRankGradFactory, {"training_args": args})
    start = {name: param.clone() for name, param in peft_model.named_parameters()}
    trainer = Trainer(peft_model, args, train_dataset=sequences, optimizer_cls_and_kwargs=choice)
    trainer.train()
    for name, param in peft_model.named_parameters():
        assert torch.equal(param, start[name]) != param.requires_grad, name
    layers = trainer.optimizer.optimizer.report().layers
    assert len(layers) == 8  # A and B of two modules in two layers
    assert all("lora_" in layer.name for layer in layers)


def added_by_transformers(model):
    model.add_adapter(LoraConfig(r=8, target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize("adapt", [with_lora, added_by_transformers])
def test_a_base_that_is_trained_beside_an_adapter_is_refused(model, adapt):
    weight = model.model.layers[0].mlp.up_proj.weight
    adapted = adapt(model)
    AdaRankGradFactory()(adapted, lr=1e-3)
    weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight is a weight of the base model"):
        AdaRankGradFactory()(adapted, lr=1e-3)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )


@pytest.mark.parametrize("name", ["LayerNorm.weight", "intermediate.dense.bias"])
def test_a_vector_of_the_base_that_peft_would_not_save_is_refused(encoder, name):
    adapted = get_peft_model(encoder, LoraConfig(r=8, target_modules=["query"]))
    weights = [param for each, param in adapted.named_parameters() if each.endswith(name)]
    weights[0].requires_grad_(True)
    with pytest.raises(ValueError, match=rf"{name} is a weight of the base .* the adapter alone"):
        AdaRankGradFactory()(adapted, lr=1e-3)


@pytest.mark.parametrize(("bias", "is_trained"), [("all", True), ("lora_only", False)])
def test_biases_that_the_adapter_saves_are_trained_plainly(encoder, bias, is_trained):
    adapted = get_peft_model(encoder, LoraConfig(r=8, target_modules=["query"], bias=bias))
    plain = names_in(AdaRankGradFactory()(adapted, lr=1e-3), project=False)
    assert any(name.endswith("query.base_layer.bias") for name in plain)
    assert any(name.endswith("LayerNorm.bias") for name in plain) == is_trained
    trained = {name for name, param in adapted.named_parameters() if param.requires_grad}
    assert plain == {name for name in trained if name.endswith(".bias")}


def test_norms_in_modules_to_save_are_trained_plainly(encoder):
    config = LoraConfig(r=8, target_modules=["query"], modules_to_save=["LayerNorm"])
    plain = names_in(AdaRankGradFactory()(get_peft_model(encoder, config), lr=1e-3), project=False)
    assert plain and all(".LayerNorm.modules_to_save." in name for name in plain)


def test_target_modules_in_the_frozen_base_are_refused(model):
    with pytest.raises(ValueError, match=r"matches none .* Frozen weights"):
        AdaRankGradFactory()(with_lora(model), lr=1e-3, optim_target_modules=["up_proj"])


def test_sharded_weights_are_refused(model):
    model.lm_head.weight.full_tensor = None  # as a DTensor has
    with pytest.raises(ValueError, match=r"lm_head\.weight is a DTensor: .* train with DDP"):
        AdaRankGradFactory()(model, lr=1e-3)


def test_a_trainer_that_knows_no_factories_is_told_so(model):
    with pytest.raises(ValueError, match=r"optimizers=\(GaLoreFactory\(\)\(model, args\), None\)"):
        GaLoreFactory([{"params": list(model.parameters())}], training_args=arguments())
