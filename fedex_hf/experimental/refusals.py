"""What cannot go through one pass is refused before the first step: what came, why not, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from peft.tuners.lora import layer as peft_layers
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import Trainer

from fedex_hf.layouts import UnsupportedModelError
from fedex_hf.lora_site import plain_name


if TYPE_CHECKING:
    from fedex_hf.trainer import FederatedTrainer

# Optimizers that change a parameter while the gradients are being computed.
_STEP_IN_BACKWARD = ("lomo", "layerwise")
INSTEAD = "or set `parallel_clients=1`."


def body_of(model: Any) -> nn.Module:
    """The part of a model that its head stands on, such as `model.roberta`; transformers calls it `base_model`.

    Raises:
        UnsupportedModelError: If the model has none, or two.
    """
    plain = model.get_base_model()
    if getattr(getattr(plain, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "`parallel_clients` with an encoder-decoder: its decoder's inputs come from the labels, and how to fill "
            f"them up was never tried. Use a model with one stack, {INSTEAD}"
        )
    body = getattr(plain, "base_model", plain)
    if body is plain:
        raise UnsupportedModelError(
            f"`parallel_clients` with a `{type(plain).__name__}`, which has no part that is shared and another that "
            "computes the loss. Allowed: models of transformers with a head, such as `AutoModelForCausalLM` or "
            f"`AutoModelForSequenceClassification` load; {INSTEAD}"
        )
    return body


def refuse_parallel_clients(federation: FederatedTrainer) -> None:
    """Refuse what would not give the result of one client after another.

    Raises:
        UnsupportedModelError: If it is the model.
        ValueError: If it is an argument.
    """
    reason = next(_reasons(federation), None)
    if reason is not None:
        raise ValueError(f"`parallel_clients={federation.args.parallel_clients}` with {reason} {INSTEAD}")
    _refuse_model(federation)


def _reasons(federation: FederatedTrainer) -> Iterator[str]:
    args, trainer = federation.args, federation.clients.trainer
    if args.parsed_client_ranks:
        yield "`client_ranks`: factors of different ranks do not stack. Leave `client_ranks` out,"
    if federation.aggregator.keeps_client_adapters:
        yield (
            f"the aggregator `{federation.aggregator.name}` as it is set: its clients have base weights of their own, "
            'so there is no common pass. Use the assignment "average" or "reinitialise",'
        )
    if args.bf16 or args.fp16:
        yield "`bf16` or `fp16`: autocast was never tried with it. Load the model in the dtype that is to compute,"
    body = body_of(federation.adapted.model)
    if args.gradient_checkpointing or any(getattr(each, "gradient_checkpointing", False) for each in body.modules()):
        yield "`gradient_checkpointing`: the second forward pass would be of one client alone. Switch it off,"
    if args.torch_compile:
        yield "`torch_compile`: a compiled pass does not see the other clients' factors. Switch it off,"
    if args.world_size > 1 or args.n_gpu > 1 or len({*(_device_map(federation) or {"": 0}).values()}) > 1:
        yield "several devices: it was never tried. Use one (`CUDA_VISIBLE_DEVICES=0`),"
    if any(each in str(getattr(args.optim, "value", args.optim)) for each in _STEP_IN_BACKWARD):
        yield f"`optim={args.optim}`: it changes parameters during the common backward pass. Use `adamw_torch`,"
    if type(trainer).training_step is not Trainer.training_step:
        yield (
            f"`{type(trainer).__mro__[2].__name__}`, which overrides `training_step`: what it does around the loss "
            "would act on all clients. Override `compute_loss` instead,"
        )


def _device_map(federation: FederatedTrainer) -> dict[str, Any] | None:
    return cast("dict[str, Any] | None", getattr(federation.adapted.model.get_base_model(), "hf_device_map", None))


def _refuse_model(federation: FederatedTrainer) -> None:
    adapted = federation.adapted
    body = body_of(adapted.model)
    modules = {module: name for name, module in adapted.model.named_modules()}
    inside = {*body.modules()}
    for name, site in adapted.sites.items():
        if site.layer in inside and type(site.layer) is not peft_layers.Linear:
            raise UnsupportedModelError(
                f"`parallel_clients` with the LoRA `{type(site.layer).__name__}` at `{name}`: clients share a pass "
                "through LoRA on `nn.Linear` and `Conv1D` only. Leave the layer out with `exclude_modules` of your "
                f"`LoraConfig`, {INSTEAD}"
            )
    parameters = {id(parameter) for parameter in body.parameters()}
    own = [name for name, parameter in adapted.tensors.items() if id(parameter) in parameters]
    if own:
        raise UnsupportedModelError(
            f"`parallel_clients` with `{own[0]}` trained in full, inside of `{modules[body]}`, which is shared. "
            "Allowed there: LoRA factors; heads may be trained in full. Take it out of `modules_to_save` or leave out "
            f"what else makes it trainable, {INSTEAD}"
        )
    for module in body.modules():
        dropout = _dropout(module)
        if dropout is not None:
            raise UnsupportedModelError(
                f"`parallel_clients` with dropout: `{plain_name(modules[module])}` has `{dropout}`. Masks of all "
                "clients at once are not those that each draws alone. Set the dropout of the model's config and "
                f"of your `LoraConfig` to 0, {INSTEAD}"
            )


def _dropout(module: nn.Module) -> str | None:
    """The attribute of a module that makes it drop values at random, with its value."""
    if isinstance(module, _DropoutNd):
        return f"p={module.p}" if module.p > 0 else None
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float) and value > 0:
            return f"{name}={value}"
    return None
