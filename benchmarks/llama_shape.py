"""Models of LLaMA-7B's shape with random weights, made on the GPU: ternary and fp16."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tsld_fx import LoweredModel
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.lowered import as_lowered

VOCABULARY, HIDDEN, INNER, HEADS = 32000, 4096, 11008, 32


def shape(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=4096, dtype="float16",
    )  # fmt: skip


def random_linear(old: nn.Linear, bits: int) -> LowBitLinear:
    """Random weights, packed on the GPU without a dense copy."""
    layer = LowBitLinear(old.in_features, old.out_features, bits, 0, device="cuda")
    if bits == 2:
        codes = torch.tensor([a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3) for c in range(3)
                              for d in range(3)], dtype=torch.uint8, device="cuda")  # fmt: skip
        layer.weight_packed = codes[torch.randint(0, 81, layer.weight_packed.shape, device="cuda", dtype=torch.int32)]
    else:
        layer.weight_packed.random_(0, 256)
    layer.weight_scale.uniform_(0.01, 0.02).mul_(2.0 if bits == 2 else 2.0 ** (2 - bits))
    return layer.eval()


def ternary_model(layers: int, head_bits: int) -> LoweredModel:
    with torch.device("meta"):
        model = LlamaForCausalLM(shape(layers))
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (module is not head or head_bits == 8):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, random_linear(module, 8 if module is head else 2))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=torch.float16, device="cuda")
                made = made.fill_(1) if made.ndim == 1 else made.normal_(std=0.02)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return as_lowered(model.eval(), "cuda")


def dense_model(layers: int) -> LlamaForCausalLM:
    with torch.device("cuda"):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            model = LlamaForCausalLM(shape(layers)).eval()
        finally:
            torch.set_default_dtype(previous)
    return model.requires_grad_(False)
