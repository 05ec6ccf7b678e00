"""The demo model and how it trains: recipes, steps, evaluation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_model_data import VOCABULARY, whole_files
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

WINDOW = 512  # tokens of context in training


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW on random windows, with warm-up and a cosine to zero."""

    rate: float
    batch: int = 32  # windows per step
    epochs: int = 0  # 0: until the time is over
    dropout: float = 0.0  # on the embedding and on what each attention and MLP block adds
    decay: float = 0.1
    warmup: float = 0.02  # share of the run

    def rate_at(self, done: float) -> float:
        """Learning rate when the share `done` (0 to 1) of the run is over."""
        return self.rate * min(done / self.warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * done))


def build_model(device: torch.device) -> LlamaForCausalLM:
    """3,475,712 parameters in fp32; the embedding is also the output layer."""
    # An attention of this name is given no mask. For others transformers looks whether they need one, and so
    # waits for the device, which a CUDA graph cannot do.
    AttentionInterface.register("plain_causal", sdpa_attention_forward)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="plain_causal",
    )
    return LlamaForCausalLM(config).to(device)


class Stepper:
    """One optimizer step on random windows of `data` (n,), replayed as a CUDA graph on a GPU: a model so
    small would otherwise wait for the launches of its kernels."""

    def __init__(self, model: LlamaForCausalLM, data: Tensor, recipe: Recipe, cuda_graph: bool) -> None:
        self.model, self.data, self.recipe = model.train(), data, recipe
        self.rate = torch.zeros((), device=data.device)
        matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.decay}
        vectors = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(
            [matrices, vectors], lr=self.rate, betas=(0.9, 0.95), fused=True, capturable=data.is_cuda
        )
        self.run: Callable[[], None] = self._step
        if cuda_graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # at rate 0: allocates, changes no weight
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.run = graph.replay

    def _step(self) -> None:
        starts = torch.randint(len(self.data) - WINDOW, (self.recipe.batch, 1), device=self.data.device)
        windows = self.data[starts + torch.arange(WINDOW + 1, device=self.data.device)]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.data.device.type, dtype=torch.bfloat16, cache_enabled=False):
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss.detach()

    def train(self, done: Callable[[int], float], every: int, report: Callable[[int], None]) -> None:
        """Steps until `done(step)` reaches 1; calls `report(step)` every `every` steps and at the end."""
        step = 0
        while (share := done(step)) < 1:
            self.rate.fill_(self.recipe.rate_at(share))
            self.run()
            step += 1
            if step % every == 0:
                report(step)
            elif step % 20 == 0 and self.data.is_cuda:
                torch.cuda.synchronize()  # lest the clock run ahead of the device
        if step % every:
            report(step)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokens: Tensor, window: int = WINDOW) -> float:
    """Nats per token of `tokens` (n,) in fp32; windows do not overlap, each token but the first counts."""
    was_training = model.training
    model.eval()
    rows = math.ceil((len(tokens) - 1) / window)
    padding = (0, rows * window - len(tokens) + 1)
    inputs = F.pad(tokens[:-1], padding).view(rows, window)
    labels = F.pad(tokens[1:], padding, value=-100).view(rows, window)
    total = 0.0
    for some_inputs, some_labels in zip(inputs.split(64), labels.split(64), strict=True):
        logits = model(input_ids=some_inputs, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), some_labels.flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (len(tokens) - 1)


def save_checkpoint(path: Path, model: LlamaForCausalLM, notes: dict[str, str]) -> None:
    """fp16 weights without the tied copy, and what the model card tells of them."""
    state = {key: value.half().cpu() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    with whole_files(path.parent) as scratch:
        save_file(state, scratch / path.name, metadata=notes)


def load_checkpoint(path: Path, device: torch.device) -> tuple[LlamaForCausalLM, dict[str, str]]:
    model = build_model(device)
    with safe_open(path, "pt") as file:
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, strict=False)  # noqa: SIM118
        return model, file.metadata()
