"""A LLaMA student and teacher with random weights, captured once and filled again for every case of a benchmark."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tsld_fx import PreparedModel, prepare
from tsld_fx.distributed.data import Batch
from tsld_fx.distributed.engine import put_parameter
from tsld_fx.preparation import graph_model

SHAPES = {"7b": (4096, 11008, 32, 32, 32000), "1b": (2048, 5504, 16, 16, 32000), "tiny": (64, 96, 4, 4, 256)}
TOKENS, SEQUENCES = 512, 4


class Models:
    """A ternary student with float32 masters and a bfloat16 teacher; nothing is on the device before `fill`.

    Args:
        shape: a name of `SHAPES`.
        graph_teacher: the teacher is captured too, as FSDP and pipelines need it; else it is transformers' own model.
    """

    def __init__(self, shape: str, device: torch.device, graph_teacher: bool = True) -> None:
        self.device = device
        hidden, inner, layers, heads, self.vocabulary = SHAPES[shape]
        self.config = LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=self.vocabulary, max_position_embeddings=2048,
        )  # fmt: skip
        start = time.perf_counter()
        self.student: PreparedModel = prepare(_empty(self.config, torch.float32))
        teacher = _empty(self.config, torch.bfloat16)
        self.teacher: PreTrainedModel = graph_model(teacher, None, ()) if graph_teacher else teacher
        self.seconds = time.perf_counter() - start
        self.shapes = {n: p.shape for n, p in self.student.named_parameters()}
        self.parameters = sum(p.numel() for p in self.student.parameters())
        self.left = 0.0  # gigabytes that the case before could not give back

    def fill(self, recompute: bool = True) -> None:
        """Whole random weights on the device, and no trace of the last case."""
        for model in (self.student, self.teacher):
            if isinstance(model, PreparedModel):
                model.gradient_checkpointing_disable()
                model.forget_views()  # and with them the shards of the last case
            for name in self.shapes:
                put_parameter(model, name, torch.nn.Parameter(torch.empty(0)))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.left = torch.cuda.memory_allocated() / 1e9
        for model, dtype in ((self.student, torch.float32), (self.teacher, torch.bfloat16)):
            for name, shape in self.shapes.items():
                value = torch.empty(shape, dtype=dtype, device=self.device).normal_(std=0.02)
                put_parameter(model, name, torch.nn.Parameter(value, requires_grad=dtype == torch.float32))
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(self.device)
        if recompute:
            self.student.gradient_checkpointing_enable()

    def batches(self, count: int) -> list[Batch]:
        ids = torch.randint(0, self.vocabulary, (count, SEQUENCES, TOKENS))
        return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]


def wait_for(file: Path | None, seconds: float = 300) -> None:
    """Until a file is there: captures can be made while something else uses the devices."""
    end = time.monotonic() + seconds
    while file is not None and not file.exists() and time.monotonic() < end:
        time.sleep(0.1)


def _empty(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model without memory for its weights; its only buffers are true ones."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model
