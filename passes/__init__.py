"""FX passes over exported decoder graphs. Each works alone on any `torch.fx.GraphModule` made by `torch.export`.

| pass | before -> after |
|---|---|
| InlineHigherOrderOps | wrap_with_set_grad_enabled(body) -> the body's nodes |
| DropMetadataAsserts | _assert_tensor_metadata(x) -> nothing |
| SetDropout | dropout(x, p, True) -> dropout(x, p, False), and back |
| CausalAttention | attention(q, k, v, mask of attention_mask) -> attention(q, k, v, is_causal), for whole blocks |
| FoldTransposedLinear | addmm(b, x, W[in, out]) -> linear(x, W.t(), b) |
| InsertFakeQuant | linear(x, W) -> linear(x, fake_quant(W)) |
| InsertDistillationHooks | output(logits) -> output(logits, hidden states, attention scores) |
| FuseHeadLoss | output(linear(h, W)) -> output(head_loss(h, W, teacher, labels)) |
| SplitOffHead | output(linear(h, W)) -> output(h, W) |
| RetargetDevice | arange(device=cpu) -> arange(device=cuda:0) |
| FreezeScales | fake_quant(W, learned scale) -> fake_quant(W, constant scale) |
| PackWeights | fake_quant(W, scale) -> dequantize_weight(packed, scale) |
| LowerLinear | linear(x, dequantize_weight(packed, scale)) -> lowbit_linear(x, packed, scale) |
| FuseRMSNorm | weight * (s * rsqrt(mean(s^2) + eps)), s = a + b -> add_rms_norm(a, b, weight, eps) |
| FuseGatedActivation | silu(gate) * up -> silu_mul(gate, up) |
| InsertKVCache | scaled_dot_product_attention(rotary(q), rotary(k), v, mask) -> cached_attention(q, k, v, cache) |
| TabulateRotary | cached_attention(..., cos(position_ids), sin(position_ids)) -> cached_attention(..., tables) |
| SelectLastToken | head(hidden) -> head(hidden[:, last]) |
| FuseGatedProjection | silu_mul(lowbit_linear(x, Wg), lowbit_linear(x, Wu)) -> gated_linear(x, [Wg and Wu in turn]) |
| FuseNormLinear | lowbit_linear(rms_norm(x, w), W) -> norm_linear(x, w, W) |
| FuseProjections | lowbit_linear(x, Wq), lowbit_linear(x, Wk), ... -> split(lowbit_linear(x, [Wq; Wk; ...])) |
"""

from tsld_fx.passes.causal_attention import CausalAttention
from tsld_fx.passes.drop_metadata_asserts import DropMetadataAsserts
from tsld_fx.passes.fold_transposed_linear import FoldTransposedLinear
from tsld_fx.passes.freeze_scales import FreezeScales
from tsld_fx.passes.fuse_gated_activation import FuseGatedActivation
from tsld_fx.passes.fuse_gated_projection import FuseGatedProjection
from tsld_fx.passes.fuse_head_loss import FuseHeadLoss
from tsld_fx.passes.fuse_norm_linear import FuseNormLinear
from tsld_fx.passes.fuse_projections import FuseProjections
from tsld_fx.passes.fuse_rms_norm import FuseRMSNorm
from tsld_fx.passes.inline_higher_order_ops import InlineHigherOrderOps
from tsld_fx.passes.insert_distillation_hooks import InsertDistillationHooks
from tsld_fx.passes.insert_fake_quant import InsertFakeQuant
from tsld_fx.passes.insert_kv_cache import InsertKVCache
from tsld_fx.passes.lower_linear import LowerLinear
from tsld_fx.passes.pack_weights import PackWeights
from tsld_fx.passes.pipelines import capture_pipeline, convert_pipeline, decode_pipeline, prepare_pipeline
from tsld_fx.passes.retarget_device import RetargetDevice
from tsld_fx.passes.runner import PassTrace, run_passes
from tsld_fx.passes.select_last_token import SelectLastToken
from tsld_fx.passes.set_dropout import SetDropout
from tsld_fx.passes.split_off_head import SplitOffHead
from tsld_fx.passes.tabulate_rotary import TabulateRotary

__all__ = [
    "CausalAttention",
    "DropMetadataAsserts",
    "FoldTransposedLinear",
    "FreezeScales",
    "FuseGatedActivation",
    "FuseGatedProjection",
    "FuseHeadLoss",
    "FuseNormLinear",
    "FuseProjections",
    "FuseRMSNorm",
    "InlineHigherOrderOps",
    "InsertDistillationHooks",
    "InsertFakeQuant",
    "InsertKVCache",
    "LowerLinear",
    "PackWeights",
    "PassTrace",
    "RetargetDevice",
    "SelectLastToken",
    "SetDropout",
    "SplitOffHead",
    "TabulateRotary",
    "capture_pipeline",
    "convert_pipeline",
    "decode_pipeline",
    "prepare_pipeline",
    "run_passes",
]
