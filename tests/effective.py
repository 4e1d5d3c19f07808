"""Effective weights of live models in float64, by formulas that ask nothing of the package: one per class of layers.

`test_layer_kinds.py` holds them against the output of the models.
"""

import bitsandbytes
import torch
from peft.tuners.lora import layer as lora
from transformers.pytorch_utils import Conv1D


def modules_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}


def parameter_name(module):
    if isinstance(module, lora.ParamWrapper):
        return module.parameter_name
    return "in_proj_weight" if isinstance(module, lora.MultiheadAttention) else "weight"


def base(module):
    """The base weight as numbers, float64."""
    weight = getattr(module.get_base_layer(), parameter_name(module))
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        scales = weight.SCB if weight.SCB is not None else module.get_base_layer().state.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    return weight.detach().double()


def update_of(module, adapter, in_attention=False):
    """What one adapter adds to the base weight, in its layout."""
    scaling = module.scaling[adapter]
    if isinstance(module, lora.Embedding):
        A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        return scaling * torch.einsum("rv,dr->vd", A.detach().double(), B.detach().double())
    A, B = module.lora_A[adapter].weight.detach().double(), module.lora_B[adapter].weight.detach().double()
    if isinstance(module, (lora.Conv1d, lora.Conv2d, lora.Conv3d)):
        return scaling * torch.einsum("ri...,or->oi...", A, B.flatten(1))
    if isinstance(module, lora.ParamWrapper) and module.num_experts > 1:
        # Expert e owns rows [e r, (e + 1) r) of A; in B it owns every `experts`-th column, from e on.
        experts, rank = module.num_experts, module.r[adapter]
        deltas = [B[:, e::experts] @ A[e * rank : (e + 1) * rank] for e in range(experts)]
        transposed = getattr(module.get_base_layer(), "is_transposed", False)
        return scaling * torch.stack([delta.T if transposed else delta for delta in deltas])
    # PEFT adds LoRA to the output projection inside an attention layer twice.
    product = (2 if in_attention else 1) * scaling * (B @ A)
    return product.T if isinstance(module.get_base_layer(), Conv1D) else product


def effective(model):
    """Layer name -> base weight and all that its active adapters add, float64."""
    modules = modules_of(model)
    attention = {
        f"{name}.base_layer.out_proj" for name in modules if isinstance(modules[name], lora.MultiheadAttention)
    }
    return {
        name: base(module) + sum(update_of(module, each, name in attention) for each in module.active_adapters)
        for name, module in modules.items()
    }


def mean(tensors, weights):
    return sum(weight / sum(weights) * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))


def norm(tensors):
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt().item()


def base_bytes(model):
    """Everything that is stored of the base weights of adapted layers, bit for bit."""
    stored = {}
    for name, module in modules_of(model).items():
        weight = getattr(module.get_base_layer(), parameter_name(module))
        stored[name] = weight.detach().reshape(-1).clone().view(torch.uint8)
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            stored[f"{name}.scales"] = weight.quant_state.absmax.clone()
    return stored


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
