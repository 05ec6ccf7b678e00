"""One graph for prompt and step, with the cache as inputs and outputs."""

from __future__ import annotations

import pytest
import torch

from tests.models import left_padded, ternary
from tsld_fx.cached_capture import capture_cached, default_positions
from tsld_fx.errors import CaptureError


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "qwen3"])
def test_prompt_in_two_parts_and_one_token_more_equals_the_whole(family: str) -> None:
    lowered = ternary(family)[1]
    decoder = capture_cached(lowered)
    assert sum(n.target is torch.ops.tsld.lowbit_linear.default for n in decoder.graph.nodes) == len(
        lowered.lowbit_layers()
    )
    step = decoder.program.module(check_guards=False)
    tokens, mask = left_padded((9, 5, 1))
    positions = default_positions(mask, 9)
    with torch.no_grad():
        whole = lowered(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    cache = decoder.empty_cache(3)
    for start, end in ((0, 4), (4, 8), (8, 9)):
        logits, *cache = step(tokens[:, start:end], mask[:, :end], positions[:, start:end], cache)
        attended = mask[:, start:end].bool()
        torch.testing.assert_close(logits[attended], whole[:, start:end][attended], rtol=1e-4, atol=1e-5)
    assert [tuple(t.shape) for t in cache] == [(3, decoder.kv_heads, 9, decoder.head_dim)] * (2 * decoder.layers)


def test_one_sequence_of_one_token() -> None:
    lowered = ternary("llama")[1]
    decoder = capture_cached(lowered)
    token, mask = torch.tensor([[7]]), torch.ones(1, 1, dtype=torch.long)
    logits, *_ = decoder.program.module(check_guards=False)(token, mask, mask - 1, decoder.empty_cache(1))
    with torch.no_grad():
        torch.testing.assert_close(logits, lowered(input_ids=token).logits, rtol=1e-4, atol=1e-5)


def test_program_shares_the_models_tensors() -> None:
    lowered = ternary("gpt2")[1]
    decoder = capture_cached(lowered)
    pointers = {t.data_ptr() for t in decoder.program.state_dict.values()}
    assert lowered.transformer.wte.weight.data_ptr() in pointers
    assert all(layer.weight_packed.data_ptr() in pointers for layer in lowered.lowbit_layers().values())


def test_model_without_positions_is_refused() -> None:
    class Odd(type(ternary("gpt2")[1]).__mro__[2]):  # type: ignore[misc]
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=True):  # type: ignore[no-untyped-def]
            raise AssertionError

    odd = object.__new__(Odd)
    odd.__dict__.update(ternary("gpt2")[1].__dict__)
    with pytest.raises(CaptureError, match=r"Odd takes no position_ids\. Export it without a KV cache"):
        capture_cached(odd)
