"""Decoding on a GPU: each kernel against its operator in plain torch, and whole models under CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models import POSITIONS, build, ids, left_padded
from tsld_fx import LoweredModel, convert, prepare
from tsld_fx import decode_ops as ops
from tsld_fx.codegen import decode_kernels as kernels
from tsld_fx.codegen.attention_plan import scratch_floats
from tsld_fx.codegen.decode_step import likeliest_supported, take_token
from tsld_fx.decode import Decoder
from tsld_fx.decode.options import Options
from tsld_fx.decode.select import Selection
from tsld_fx.decode.state import StepState

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
SIZES = {
    "llama": {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32},
    "qwen3": {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32},
    "gpt2": {"n_embd": 64},
    "opt": {"hidden_size": 64, "ffn_dim": 160},
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 1, 4096), (2, 5, 1000), (1, 1, 11008)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, other, weight = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    expected = ops.rms_norm(x.double(), weight.double(), 1e-5)
    assert relative(torch.ops.tsld.rms_norm(x, weight, 1e-5), expected) <= TOLERANCE[dtype]
    y, total = torch.ops.tsld.add_rms_norm(x, other, weight, 1e-5)
    assert torch.equal(total, x + other)
    assert relative(y, ops.rms_norm(total.double(), weight.double(), 1e-5)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 2, 2208), (64, 1, 22016)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    both = normal(*shape, dtype=dtype)
    gate, up = both.chunk(2, dim=-1)
    assert kernels.gate_supported(gate, up)
    assert relative(torch.ops.tsld.silu_mul(gate, up), ops.silu_mul(gate.double(), up.double())) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rotary", ["of this step", "of all positions", None])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "size", "length"),
    [(1, 32, 32, 128, 640), (3, 12, 2, 64, 200), (2, 8, 1, 16, 1024), (5, 4, 4, 256, 70),
     (40, 14, 2, 32, 130), (1, 1, 1, 8, 3), (2, 8, 2, 64, 4100)],
)  # fmt: skip
def test_attention(batch: int, heads: int, kv_heads: int, size: int, length: int, rotary: str | None, dtype) -> None:
    """At the first, a middle and the last position; the cache holds NaN where nothing was written yet."""
    floats = scratch_floats(batch, heads, kv_heads, size, length, *kernels.chip(0))
    scratch = torch.zeros(floats, device="cuda")
    for positions in ([0] * batch, [(7 * b + 2) % length for b in range(batch)], [length - 1] * batch):
        where = torch.tensor(positions, device="cuda")[:, None]
        parts = normal(batch, 1, (heads + 2 * kv_heads) * size, dtype=dtype).split(
            [heads * size, kv_heads * size, kv_heads * size], dim=-1
        )
        q, k, v = (part.view(batch, 1, -1, size) for part in parts)
        rows_of_tables = (length,) if rotary == "of all positions" else (batch, 1)
        angle = torch.rand(*rows_of_tables, size // 2, device="cuda") * 6
        tables = [torch.cat([f(angle)] * 2, -1).to(dtype) if rotary else None for f in (torch.cos, torch.sin)]
        caches = [normal(batch, kv_heads, length, size, dtype=dtype) for _ in range(2)]
        for cache in caches:
            cache.masked_fill_((torch.arange(length, device="cuda") >= where)[:, None, :, None], float("nan"))
        exact = [cache.double().nan_to_num(0) for cache in caches]
        wide = [None if t is None else t.double() for t in tables]
        expected = ops.cached_attention(
            q.double(), k.double(), v.double(), *wide, where, *exact, scratch, size**-0.5, False
        )
        assert kernels.attention_supported(q, k, v, *tables)
        for _ in range(2):  # the counters must be back at zero
            got = torch.ops.tsld.cached_attention(q, k, v, *tables, where, *caches, scratch, size**-0.5, False)
            assert relative(got, expected) <= 2 * TOLERANCE[dtype], positions
        rows = torch.arange(batch, device="cuda")
        assert torch.equal(caches[1][rows, :, where[:, 0]], v[:, 0])
        assert relative(caches[0][rows, :, where[:, 0]], exact[0][rows, :, where[:, 0]]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float32])
@pytest.mark.parametrize(("batch", "vocabulary"), [(1, 32000), (5, 50257), (3, 7), (64, 1024), (2, 1)])
def test_taking_the_likeliest_token(batch: int, vocabulary: int, dtype: torch.dtype) -> None:
    """As the plain state does it: ties, NaN, ends of sequences, the last place."""
    length, device = 9, torch.device("cuda")
    ours, plain = StepState(batch, length, device), StepState(batch, length, device)
    for state in (ours, plain):
        state.begin(Options(5, Selection(), 1.0, 1.0, (vocabulary // 2, 0), 3), max(1, batch - 1))
        state.positions += 4
    for step in range(12):
        logits = normal(batch, 2, vocabulary, dtype=dtype)[:, -1]
        logits[0] = logits[0].round()  # ties
        if step % 3 == 1:
            logits[:, vocabulary // 2] = 100.0  # the sequences end
        if step == 2:
            logits[-1, vocabulary // 3 :] = float("nan")
        if likeliest_supported(logits):
            take_token(ours, logits, None)
        else:
            take_token(ours, None, logits.argmax(-1))
        best = logits.float().nan_to_num(torch.inf)
        plain.take((best == best.amax(-1, keepdim=True)).int().argmax(-1))
        for name in ("tokens", "positions", "history", "counts", "finished"):
            assert torch.equal(getattr(ours, name), getattr(plain, name)), (name, step)


def lowered_model(family: str, dtype: torch.dtype) -> LoweredModel:
    return convert(prepare(build(family, **SIZES[family])), backend="cuda").to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", SIZES)
def test_model_over_the_static_cache(family: str, dtype: torch.dtype) -> None:
    """`compile_decode` compares logits itself; the CUDA graphs give the tokens of the operators one by one."""
    lowered = lowered_model(family, dtype)
    tokens, mask = (t.cuda() for t in left_padded())
    made = lowered.compile_decode(4, POSITIONS)
    eager = Decoder(lowered, 4, POSITIONS, cuda_graphs=False)
    for how in (Selection(), Selection(True, 5, True)):
        for rows in (1, 3):
            options = Options(24, how, 1.0, 0.9, (), 0)
            results = []
            for one in (made, eager, made):
                torch.manual_seed(3)
                results.append(one.generate(tokens[:rows], mask[:rows], options))
            assert results[0].shape == (rows, tokens.shape[1] + 24)
            if not how.sample:
                assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2]) or how.sample
    assert lowered.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False).shape[0] == 3


@pytest.mark.parametrize("family", SIZES)
def test_captured_prompts(family: str) -> None:
    """The first prompt of a size runs operator by operator, the second is captured, the others replay it."""
    lowered = lowered_model(family, torch.float16)
    decoder = lowered.compile_decode(3, POSITIONS)
    for tokens in (3, 17, 16):
        prompt, last = ids(3, tokens).cuda(), torch.tensor([tokens - 1, 0, tokens // 2], device="cuda")
        with torch.no_grad():
            expected = decoder._prefill._run(prompt, last)
            for other in (3, tokens, tokens, tokens):
                decoder._prefill(ids(3, other, 1).cuda(), last.clamp(max=other - 1))
                got = decoder._prefill(prompt, last)
                assert relative(got, expected) <= 1e-2
    captured = decoder._prefill._captured
    assert set(captured) == {(3, 16), (3, min(32, POSITIONS))} and None not in captured.values()


def test_fused_weights_are_held_in_one_layout() -> None:
    lowered = lowered_model("llama", torch.float16)
    decoder = lowered.compile_decode(1, POSITIONS)
    for layer in decoder.graphs.decode.fused_projections.children():
        assert layer.weight_packed.untyped_storage().nbytes() == 0
    lowered.generate(ids(1, 6).cuda(), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_batches(batch: int) -> None:
    lowered = lowered_model("llama", torch.float16)
    decoder = lowered.compile_decode(batch, POSITIONS)
    prompt = ids(batch, 6).cuda()
    options = Options(10, Selection(), 1.0, 1.0, (), 0)
    together = decoder.generate(prompt, torch.ones_like(prompt), options)
    logits = lowered(together).logits[:, 5:-1]
    best = logits.gather(-1, together[:, 6:, None])[..., 0]
    assert bool((best >= logits.amax(-1) - 0.05).all())  # each token is (nearly) the likeliest after those before it


def test_float32_runs_the_plain_operators() -> None:
    lowered = convert(prepare(build("llama")), backend="reference").cuda()
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = lowered.generate(ids(2, 6).cuda(), **options)
    lowered.compile_decode(2, POSITIONS)
    assert torch.equal(lowered.generate(ids(2, 6).cuda(), **options), expected)
