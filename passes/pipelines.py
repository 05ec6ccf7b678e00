"""The pipelines of prepare and convert: which passes, in which order, and why."""

from __future__ import annotations

from torch.fx.passes.infra.pass_base import PassBase

from tsld_fx.config import QuantConfig
from tsld_fx.passes.drop_metadata_asserts import DropMetadataAsserts
from tsld_fx.passes.fold_transposed_linear import FoldTransposedLinear
from tsld_fx.passes.freeze_scales import FreezeScales
from tsld_fx.passes.fuse_gated_activation import FuseGatedActivation
from tsld_fx.passes.fuse_gated_projection import FuseGatedProjection
from tsld_fx.passes.fuse_norm_linear import FuseNormLinear
from tsld_fx.passes.fuse_projections import FuseProjections
from tsld_fx.passes.fuse_rms_norm import FuseRMSNorm
from tsld_fx.passes.inline_higher_order_ops import InlineHigherOrderOps
from tsld_fx.passes.insert_distillation_hooks import InsertDistillationHooks
from tsld_fx.passes.insert_fake_quant import InsertFakeQuant
from tsld_fx.passes.insert_kv_cache import InsertKVCache
from tsld_fx.passes.lower_linear import LowerLinear
from tsld_fx.passes.pack_weights import PackWeights
from tsld_fx.passes.set_dropout import SetDropout
from tsld_fx.passes.tabulate_rotary import TabulateRotary


def capture_pipeline() -> tuple[PassBase, ...]:
    """Clean an export up into a flat graph of plain operators."""
    return (
        InlineHigherOrderOps(),  # first: the regions hide operators from the passes after it
        DropMetadataAsserts(),  # they pin dtype and device, which autocast and `.to()` change
    )


def prepare_pipeline(
    config: QuantConfig, taps: tuple[str, ...] = (), output_embedding: str = "lm_head"
) -> tuple[PassBase, ...]:
    """Captured graph -> graph to train."""
    return (
        FoldTransposedLinear(),  # so that InsertFakeQuant sees [out, in] rows everywhere
        InsertFakeQuant(config, output_embedding),
        InsertDistillationHooks(taps),  # last: it only adds outputs
    )


def convert_pipeline() -> tuple[PassBase, ...]:
    """Trained graph -> graph over packed weights."""
    return (
        SetDropout(training=False),
        InsertDistillationHooks(()),  # taps serve training only
        FreezeScales(),  # the learned and the found scales become constants
        PackWeights(),  # codes, two to eight bits each
        LowerLinear(),  # last: it needs to see the whole of linear(x, dequantize_weight(...))
    )


def decode_pipeline(batch: int, length: int, scratch: int = 0, fuse: bool = True) -> tuple[PassBase, ...]:
    """Lowered graph with position_ids -> graph that computes new tokens over a static KV cache."""
    fusing = (
        FuseGatedActivation(),
        FuseGatedProjection(),  # before FuseProjections, which would take gate and up otherwise
        FuseProjections(),  # before the cache, which looks through views of a product, not through products
        FuseRMSNorm(),
        FuseNormLinear(),  # after all that makes products out of several
    )
    return (
        *(fusing if fuse else ()),
        InsertKVCache(batch, length, scratch),  # it also removes the mask and what computes it
        *((TabulateRotary(length),) if fuse else ()),  # it looks at the attention over the cache
    )
