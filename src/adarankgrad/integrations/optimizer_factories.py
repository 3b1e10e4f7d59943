"""Factories for transformers' `Trainer`: from a model and its training arguments to an optimizer.

A class of optimizer that Trainer builds itself gets two lists of nameless weights, so everything
with two axes would be projected, embeddings and head included. A factory gets the model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import check_target_module_exists

from adarankgrad.optim import param_groups
from adarankgrad.optim.groups import Group
from adarankgrad.train.errors import unknown_name
from adarankgrad.train.optimizers import allowed_arguments, find_optimizer
from adarankgrad.train.values import parse_arguments

_GROUP_OPTIONS = ("include", "exclude", "smallest_side")
_OWN_OPTIONS = ("optim_target_modules", "plain_lr", "device_mesh")
# Settings of Axolotl that its own optimizers read off the training arguments.
_OTHER_RATES = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")


class OptimizerFactory:
    """Builds one of our optimizers for the model that a `Trainer` trains.

    Weights are divided by `param_groups`: matrices and fused experts are projected, embeddings,
    output head, norms and biases are not. Weight decay acts on the weights that Trainer itself
    would decay.

    Trainer does not hand its arguments to a factory, so name them, as in the example; Axolotl does.
    Learning rate, betas, eps, weight decay, ``optim_target_modules`` and ``optim_args`` then come
    from there, where no option says otherwise.

    Options, which may be given as text: those of the optimizer, ``include``, ``exclude`` and
    ``smallest_side`` of `param_groups`, and

    - ``optim_target_modules``: of the weights that are projected by default, only those of matching
      modules are: ``"all-linear"``, a regular expression that matches a whole name, or a list of
      parts of names. Differs from transformers' GaLore, whose ``"all-linear"`` has the head.
    - ``plain_lr``: learning rate of the weights that are not projected.
    - ``device_mesh``: of Axolotl, for factories that shard; ours do not.

    An optimizer that projects nothing takes ``device_mesh`` alone of these.

    Attributes:
        method: name of the optimizer in `adarankgrad.train.optimizers`.

    Example:
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model,
        ...     args,
        ...     optimizer_cls_and_kwargs=(AdaRankGradFactory, {"training_args": args}),
        ... )
    """

    method: ClassVar[str]

    def __init__(self, *groups: Any, **options: Any) -> None:
        if groups or options:
            raise ValueError(
                f"{type(self).__name__} is no class of optimizer: this version of transformers "
                "does not know factories. Call it yourself, "
                f"Trainer(optimizers=({type(self).__name__}()(model, args), None))"
            )

    def __call__(
        self, model: nn.Module, training_args: TrainingArguments | None = None, **options: Any
    ) -> Optimizer:
        """Build the optimizer.

        Args:
            model: as Trainer trains it, with peft's adapters or without.
            training_args: of the Trainer; without them ``lr`` has to be given.
            options: see the class.

        Raises:
            ValueError: if an option is unknown or out of range, no weight would be projected,
                ``training_args`` has a rate that is not honoured, weights outside the adapters of a
                peft model are trained, or a weight is sharded.
        """
        options = {name: _parsed(value) for name, value in options.items()}
        if training_args is not None:
            _check_rates(training_args)
            options = {**self._options_of(training_args), **options}
        self._check_names(options)
        _check_weights(model)
        targets, plain_lr, _ = (options.pop(name, None) for name in _OWN_OPTIONS)
        grouping = {name: options.pop(name) for name in _GROUP_OPTIONS if name in options}
        plain = {} if plain_lr is None else {"lr": plain_lr}
        if targets is not None:
            grouping["include"] = _patterns_of_targets(model, targets, grouping)
        if find_optimizer(self.method).projects_embeddings and "include" not in grouping:
            grouping["embeddings"] = plain
        groups = list(_decayed_as_by_trainer(model, param_groups(model, **grouping)))
        if find_optimizer(self.method).is_low_rank:
            self._check_projects(groups)
        for group in groups:
            if not group["project"]:
                group.update(plain)
        return find_optimizer(self.method).build(groups, **options)

    def _allowed_options(self) -> set[str]:
        spec = find_optimizer(self.method)
        own = (*_GROUP_OPTIONS, *_OWN_OPTIONS) if spec.is_low_rank else ("device_mesh",)
        return {*allowed_arguments(spec), *own}

    def _options_of(self, args: TrainingArguments) -> dict[str, Any]:
        """Read what the optimizer takes, and all that was asked for by name."""
        options = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
        allowed = self._allowed_options()
        options = {name: value for name, value in options.items() if name in allowed}
        if args.optim_target_modules is not None:
            options["optim_target_modules"] = _parsed(args.optim_target_modules)
        return {**options, **parse_arguments(args.optim_args or "", "optim_args")}

    def _check_names(self, options: dict[str, Any]) -> None:
        name, allowed = type(self).__name__, self._allowed_options()
        for option in options:
            if option not in allowed:
                known = sorted({*allowed, "training_args"})
                raise unknown_name(f"option of {name}", option, known)
        if "lr" not in options:
            raise ValueError(
                f"{name} has no learning rate, since Trainer does not hand its arguments on: write "
                f'optimizer_cls_and_kwargs=({name}, {{"training_args": args}}), or give lr'
            )

    def _check_projects(self, groups: list[Group]) -> None:
        if not any(group["project"] for group in groups):
            raise ValueError(
                f"no trainable weight of the model is worth projecting, so {self.method} would be "
                "plain AdamW: lower smallest_side (of adapters, the short side is their rank), or "
                "take another optimizer"
            )


class AdaRankGradFactory(OptimizerFactory):
    """`AdaRankGrad` for a Trainer (`OptimizerFactory`)."""

    method = "adarankgrad"


class PublishedAdaRankGradFactory(OptimizerFactory):
    """`AdaRankGrad.published` for a Trainer (`OptimizerFactory`)."""

    method = "adarankgrad-published"


class LowMemoryAdaRankGradFactory(OptimizerFactory):
    """`AdaRankGrad.low_memory` for a Trainer (`OptimizerFactory`).

    Embeddings and head are projected as well, unless ``include`` or ``optim_target_modules`` says
    what is.
    """

    method = "adarankgrad-low-memory"


class GaLoreFactory(OptimizerFactory):
    """`GaLore` for a Trainer (`OptimizerFactory`)."""

    method = "galore"


class FiraFactory(OptimizerFactory):
    """`Fira` for a Trainer (`OptimizerFactory`)."""

    method = "fira"


class OrthogonalizedSGDFactory(OptimizerFactory):
    """`OrthogonalizedSGD` for a Trainer (`OptimizerFactory`)."""

    method = "orthogonalized-sgd"


class AdaGradNormFactory(OptimizerFactory):
    """`AdaGradNorm` for a Trainer (`OptimizerFactory`), which projects nothing."""

    method = "adagrad-norm"


def _parsed(value: Any) -> Any:
    """Read text as the Python literal that it may be, as in settings files."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _check_rates(args: TrainingArguments) -> None:
    for name in _OTHER_RATES:
        value = getattr(args, name, None)
        if value is not None:
            raise ValueError(
                f"{name} = {value!r} is not honoured here: leave it out, and set plain_lr for "
                "weights that are not projected"
            )


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that cannot be trained or would not be saved."""
    configs = getattr(model, "peft_config", None) or {}
    adapters = [config for config in configs.values() if not config.is_prompt_learning]
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if hasattr(param, "full_tensor"):
            raise ValueError(f"{name} is a DTensor: weights cannot be sharded here, train with DDP")
        if adapters and not _is_saved_by_peft(name, adapters):
            is_bias = name.endswith(".bias")
            raise ValueError(
                f"{name} is a weight of the base model, trained beside an adapter, and peft saves "
                "the adapter alone: freeze it (requires_grad_(False)), name its module in "
                f"modules_to_save,{' set bias in the adapter,' if is_bias else ''} or train the "
                "base model without an adapter"
            )


def _is_saved_by_peft(name: str, adapters: list[Any]) -> bool:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    parts = [PEFT_TYPE_TO_PREFIX_MAPPING[adapter.peft_type] for adapter in adapters]
    if any(part in name for part in (*parts, "modules_to_save", "trainable_tokens_")):
        return True
    biases = [getattr(adapter, "bias", "none") for adapter in adapters]
    of_targets = any(bias.endswith("_only") for bias in biases)  # such as "lora_only"
    return ("all" in biases and name.endswith(".bias")) or (
        of_targets and name.endswith(".base_layer.bias")
    )


def _patterns_of_targets(
    model: nn.Module, targets: str | list[str], grouping: dict[str, Any]
) -> list[str] | None:
    if grouping.get("include") is not None:
        raise ValueError(
            f"optim_target_modules {targets!r} and include {grouping['include']!r} both choose "
            "what is projected: give one of them"
        )
    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        return None
    default = [
        name
        for group in param_groups(model, **grouping)
        for name, _ in group["params"]
        if group["project"]
    ]
    chosen = [
        name
        for name in default
        for layer in (name.removesuffix(".weight"), name.rpartition(".")[0])
        if check_target_module_exists(targets, layer)
    ]
    if not chosen:
        raise ValueError(
            f"optim_target_modules {targets!r} matches none of the weights that can be projected: "
            f"{', '.join(default[:3]) or 'there are none'}{', ...' if len(default) > 3 else ''}. "
            "Frozen weights, embeddings and the head are not among them"
        )
    _check_targets(model, targets)
    return [f"^{re.escape(name)}$" for name in dict.fromkeys(chosen)]


def _check_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Refuse an entry of a list that no module's or weight's name matches, such as a misspelt one.

    One that matches what is never projected stays without effect.
    """
    if isinstance(targets, str):
        return
    named = [*model.named_modules(), *model.named_parameters()]
    for target in targets:
        if not any(check_target_module_exists([target], name) for name, _ in named):
            raise ValueError(
                f"optim_target_modules names {target!r}, which no module of the model matches"
            )


def _decayed_as_by_trainer(model: nn.Module, groups: list[Group]) -> Iterator[Group]:
    """Split the groups by whether Trainer would decay their weights."""
    unbuilt = Trainer.__new__(Trainer)  # of which the rule reads nothing
    decayed = set(unbuilt.get_decay_parameter_names(model))
    for group in groups:
        shared = {name: value for name, value in group.items() if name != "weight_decay"}
        for decay in ({}, {"weight_decay": 0.0}):
            members = [pair for pair in group["params"] if (pair[0] in decayed) == (not decay)]
            if members:
                yield {**shared, "params": members, **decay}
