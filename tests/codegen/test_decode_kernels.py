"""The kernels between the products: source, compilation for both architectures, and how work is shared."""

from __future__ import annotations

import pytest
import torch

from tsld_fx.codegen import decode_kernels as kernels
from tsld_fx.codegen import select_config
from tsld_fx.codegen.attention_plan import AttentionPlan, attention_plan, scratch_floats
from tsld_fx.codegen.compiler import find_compiler, parse_resources
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.render import kernel_name, render
from tsld_fx.codegen.select_config import choose
from tsld_fx.codegen.spec import KernelSpec
from tsld_fx.errors import BackendError

KINDS = [("rms_norm", 0, 0, 0), ("silu_mul", 0, 0, 0), ("take_token", 0, 0, 0)]
KINDS += [("attention", *shape) for shape in ((128, 1, 128), (128, 1, 256), (64, 8, 256), (256, 8, 128))]


def test_source(golden) -> None:
    source, name = kernels.render("attention", torch.bfloat16, 128, 4)
    assert name == "tsld_attention_bf16_d128_r4"
    golden("decode_attention_bf16_d128_r4.cu", source)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("kind", "head_dim", "rows", "threads"), KINDS)
def test_no_spills(kind: str, head_dim: int, rows: int, threads: int, target: str) -> None:
    source, name = kernels.render(kind, torch.float16, head_dim, rows, threads)  # type: ignore[arg-type]
    _, log = find_compiler("nvcc").compile(source, target)
    (usage,) = parse_resources(log)
    assert usage.kernel == name
    assert not (usage.stack or usage.spill_stores or usage.spill_loads)


def test_too_much_shared_memory_is_a_compile_error() -> None:
    source, _ = kernels.render("attention", torch.float16, 256, 16)
    with pytest.raises(Exception, match="chose too many heads"):
        find_compiler("nvcc").compile(source, "sm_80")


def test_work_is_shared_so_that_the_machine_is_full() -> None:
    def plan(batch: int, kv_heads: int, length: int, capability: int = 90) -> AttentionPlan:
        return attention_plan(batch, 32, kv_heads, 128, length, capability, 132)

    assert plan(1, 32, 768) == AttentionPlan(rows=1, splits=8, cluster=True, threads=128)
    assert plan(1, 32, 90).splits == 1  # too few positions for more
    assert plan(1, 8, 768).rows < plan(32, 8, 768).rows == 4
    assert not plan(1, 32, 768, 80).cluster  # no clusters before Hopper
    assert not plan(8, 8, 8192).cluster  # they would not fit side by side
    wide = plan(64, 4, 4096)  # results that take much shared memory
    assert (wide.rows, wide.cluster, wide.threads) == (8, False, 128)
    for batch in range(1, 9):  # enough for every smaller batch, too
        needed = 8 * 32 + batch * 32 * plan(batch, 8, 1024).splits * (128 + 2)
        assert scratch_floats(8, 32, 8, 128, 1024, 90, 132) >= needed


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_fused_products_do_not_spill(bits: int, target: str) -> None:
    for norm, gated in ((True, False), (False, True), (True, True)):
        spec = KernelSpec("fp16", bits, 0, target, norm=norm, gated=gated)
        configs = [choose(spec, 4096, 4096, m, 132).config for m in (1, 8)]
        source = render(spec, configs)
        assert f"{str(norm).lower()}, {str(gated).lower()}, false>" in source
        usages = parse_resources(find_compiler("nvcc").compile(source, target)[1])
        assert {u.kernel for u in usages} == {kernel_name(spec, c) for c in configs}
        assert not [u for u in usages if u.stack or u.spill_stores or u.spill_loads]


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_digits_do_not_spill(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_config, "MOST_DIGIT_TOKENS", 2)
    for norm, gated, group in ((False, False, 0), (True, True, 0), (True, True, 128)):
        spec = KernelSpec("bf16", 2, group, target, norm=norm, gated=gated)
        configs = [choose(spec, n, 4096, m, 132).config for n in (4096, 22016) for m in (1, 2)]
        assert all(c.digits and c.tokens in (1, 2) for c in configs)
        source = render(spec, configs)
        usages = parse_resources(find_compiler("nvcc").compile(source, target)[1])
        assert {u.kernel for u in usages} == {kernel_name(spec, c) for c in configs}
        assert not [u for u in usages if u.stack or u.spill_stores or u.spill_loads]


def test_where_digits_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_config, "MOST_DIGIT_TOKENS", 2)
    ternary = KernelSpec("fp16", 2, 0, "sm_90a")
    for spec in (ternary, KernelSpec("fp16", 2, 128, "sm_80")):
        assert choose(spec, 4096, 4096, 2, 132).config.digits
    for spec, k, m in ((ternary, 4096, 3), (KernelSpec("fp16", 2, 64, "sm_90a"), 4096, 1),
                       (KernelSpec("fp16", 4, 0, "sm_90a"), 4096, 1), (ternary, 1 << 18, 1)):  # fmt: skip
        assert not choose(spec, 4096, k, m, 132).config.digits
    with pytest.raises(BackendError, match="digits are for stream kernels of one or two tokens"):
        GemmConfig(4, 1, 1, 8, 1, 3, "stream", digits=True)
    with pytest.raises(BackendError, match="takes ternary weights with one scale per row or 128 inputs"):
        render(KernelSpec("fp16", 4), [GemmConfig(1, 1, 1, 8, 1, 3, "stream", digits=True)])


def test_only_stream_kernels_are_fused() -> None:
    spec = KernelSpec("fp16", 2, 0, "sm_90a", norm=True)
    with pytest.raises(BackendError, match="Choose a stream configuration"):
        render(spec, [choose(spec, 4096, 4096, 64, 132).config])


def test_which_tensors_have_kernels() -> None:
    half = torch.zeros(2, 1, 24, dtype=torch.float16)
    assert kernels.gate_supported(half[..., :8], half[..., 8:16])
    assert kernels.taking_turns_supported(half[..., :16].contiguous())
    assert not kernels.taking_turns_supported(half) and not kernels.taking_turns_supported(half[..., :16])
    assert not kernels.gate_supported(half[..., :8], half[..., 4:12])  # not 16-byte aligned
    assert not kernels.gate_supported(half.float()[..., :8], half.float()[..., 8:16])
    q = torch.zeros(2, 1, 4, 32, dtype=torch.float16)
    assert kernels.attention_supported(q, q, q, None, None)
    assert not kernels.attention_supported(q.expand(2, 3, 4, 32), q, q, None, None)  # more than one token
    assert not kernels.attention_supported(q[..., :24], q[..., :24], q[..., :24], None, None)
    assert not kernels.norm_supported(half[..., :9], half[0, 0, :9])
