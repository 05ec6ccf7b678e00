"""How a kernel computes: tile shapes and pipeline depth. Mirrors the sizes of `cuda_templates/tsld/*.cuh`.

The rendered source asserts that both sides agree, so that a mistake here is a compile error, not a bad launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tsld_fx.codegen.spec import CHUNK, TILE_ROWS, KernelSpec
from tsld_fx.errors import BackendError

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_REGISTERS = 65536  # of a multiprocessor
_PAD_ROWS = 20  # epilogue.cuh: floats per token in shared memory


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that one block may take on this architecture."""
    return SHARED_LIMIT[max(c for c in SHARED_LIMIT if c <= max(capability, 80))]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil_div(a, b) * b


@dataclass(frozen=True)
class GemmConfig:
    """Tile shapes of one kernel.

    tokens: rows of x staged per block (1 for one token; otherwise the tokens of a block).
    warps_n x warps_m x warps_k: how the warps share output rows, tokens and inputs.
    row_tiles: 16-row tiles per warp (mma, stream, digits; 4 per warp group where digits use wgmma) or 64-row tiles per
        warp group of four warps (wgmma).
    stages: buffers of the asynchronous copies.
    kernel: "stream" (few tokens; all warps lie along the inputs), "digits" (ternary, some tens of tokens: two bytes of
        x on the 8-bit tensor cores), "mma" (any number of tokens), "wgmma" (Hopper, many tokens;
        all warps lie along the rows) or "tile" (many tokens without Hopper's instructions).
    cluster: wgmma, digits; Hopper, up to 64 tokens, ternary: the blocks that split K form a cluster and add up in its
        shared memory. digits take their products from wgmma then.
    ahead: wgmma, ternary: buffers of four chunks that weights have for themselves; 0 puts them beside x in the stages.
    digits: stream, one or two tokens, ternary with a scale per row or 128 inputs: x as four int8 digits
        (stream_digits.cuh).
    """

    tokens: int
    warps_n: int
    warps_m: int
    warps_k: int
    row_tiles: int
    stages: int
    kernel: Literal["stream", "digits", "mma", "tile", "wgmma"] = "mma"
    digits: bool = False
    cluster: bool = False
    ahead: int = 0

    def __post_init__(self) -> None:
        if self.walks and (self.warps_m != 1 or self.warps_n != 1 or self.tokens > 64):
            raise BackendError(
                f"GemmConfig {self.name}: a {self.kernel} kernel takes at most 64 tokens, and all its warps lie "
                "along the inputs."
            )
        if self.digits and (self.kernel != "stream" or self.tokens > 2):
            raise BackendError(f"GemmConfig {self.name}: digits are for stream kernels of one or two tokens.")
        if self.ahead and (self.kernel != "wgmma" or self.tokens > 64 or 4 * self.ahead < self.stages + 3):
            raise BackendError(
                f"GemmConfig {self.name}: weights have buffers of their own in wgmma kernels of up to 64 tokens, for "
                "at most 4 * ahead - 3 stages."
            )
        if self.cluster and (self.kernel not in ("wgmma", "digits") or self.tokens > 64):
            raise BackendError(f"GemmConfig {self.name}: clusters are for wgmma and digits kernels of up to 64 tokens.")
        groups_of_warps = not self.cluster or (self.warps_k % 4 == 0 and self.row_tiles == 4)
        if self.kernel == "digits" and (self.tokens % 8 or not groups_of_warps):
            raise BackendError(
                f"GemmConfig {self.name}: a digits kernel takes a multiple of 8 tokens, and with clusters four row "
                "tiles and whole groups of four warps."
            )
        if self.persistent and (
            self.warps_m * self.warps_k != 1
            or self.warps_n % 4
            or self.tokens not in (16, 32, 64, 128, 256)
            or self.block_rows > 512
        ):
            raise BackendError(
                f"GemmConfig {self.name}: a {self.kernel} kernel takes 16, 32, 64, 128 or 256 tokens, whole groups of "
                "four warps along the rows, and at most 512 rows per block."
            )

    @property
    def walks(self) -> bool:
        """Whether a block walks over several row groups, with its inputs of x in shared memory for good."""
        return self.kernel in ("stream", "digits")

    def serves(self, spec: KernelSpec) -> bool:
        """Whether there is such a kernel for these weights, activations and target."""
        some = self.kernel == "digits" or self.cluster or self.ahead
        if some and (spec.bits != 2 or spec.group not in (0, 128) or spec.quantised is not None):
            return False
        if self.kernel == "tile" and (spec.bits != 2 or spec.group or spec.quantised is not None):
            return False
        return spec.hopper or not (self.cluster or self.persistent)

    @property
    def tensor_copies(self) -> bool:
        """Whether x comes by the tensor copy engine."""
        return self.persistent

    @property
    def threads(self) -> int:
        if self.persistent:
            return 32 * self.warps_n + (128 if self.moves_registers else 32)
        return 32 * self.warps_n * self.warps_m * self.warps_k

    @property
    def moves_registers(self) -> bool:
        """WgmmaConfig::kMoveRegisters: a whole producer warp group gives its registers to the consumers."""
        return self.persistent and self.row_tiles * self.tokens > 192

    @property
    def persistent(self) -> bool:
        """Whether blocks walk over output tiles, fed by tensor copies (wgmma)."""
        return self.kernel == "wgmma"

    def least_blocks(self, spec: KernelSpec) -> int:
        """Blocks that shall fit on one multiprocessor: bounds the registers that the compiler may take."""
        if self.moves_registers:
            return 1
        if self.kernel == "digits":
            if self.cluster:
                registers = 8 * self.token_tiles + 80 + 12 * self.token_tiles * bool(spec.group)
            else:
                registers = 8 * self.row_tiles * self.token_tiles + 4 * self.row_tiles + 8 * self.token_tiles + 32
                registers += 4 * self.row_tiles * self.token_tiles * bool(spec.group)
            return max(1, _REGISTERS // (self.threads * _round_up(max(registers, 96), 8)))  # 96: x in the making
        if self.kernel == "wgmma":
            registers, warps = self.row_tiles * self.tokens // 2 + 72, self.threads // 32
            registers += 24 * (self.row_tiles > 1 and self.tokens == 16)  # addresses of two row tiles
            if (spec.bits, spec.group) == (2, 128):
                registers += 8 + self.tokens // 2 * self.cluster  # WgmmaConfig::kOwnScales
            else:
                registers += 24 * (spec.quantised is not None or spec.group > 0)  # the scales of tokens or of groups
            fitting = [b for b in (6, 5, 4, 3, 2) if _REGISTERS // (32 * _round_up(b * warps, 4)) >= registers]
            return max(fitting, default=1)
        if self.kernel == "tile":
            registers = 4 * self.row_tiles * self.token_tiles + 4 * self.token_tiles + 8 * self.row_tiles + 64
            return max(1, _REGISTERS // (self.threads * min(registers, 255)))
        sums = (
            self.row_tiles * self.token_tiles * (8 if spec.group and self.token_tiles < 4 else 4)
        )  # fp32 accumulators per thread
        registers = sums + 4 * self.token_tiles + 6 * self.row_tiles + (48 if spec.bits == 2 else 64)
        registers += 32 * self.digits  # activations in the making
        return max(1, min(_REGISTERS // (self.threads * registers), 1024 // self.threads))

    @property
    def token_tiles(self) -> int:
        """8-token tiles per warp."""
        return _ceil_div(self.tokens, 8 * self.warps_m)

    @property
    def block_rows(self) -> int:
        """Rows of an output tile; for stream and digits: of a row group, of which a block has several."""
        return self.warps_n * self.row_tiles * TILE_ROWS

    @property
    def block_tokens(self) -> int:
        if self.walks:
            return self.tokens
        return self.warps_m * self.token_tiles * 8

    @property
    def stage_chunks(self) -> int:
        """Chunks of 128 inputs that a block needs at least to keep its warps busy."""
        return 1 if self.walks else self.warps_k

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of a block that does not depend on the shape, bytes; kSharedBytes of the configuration."""
        if self.walks:
            teams = self.warps_k // 4 if self.cluster else self.warps_k
            stage = self.row_tiles * self.unit_chunks(spec) * (tile_bytes(spec.bits) + meta_bytes(spec))
            unfinished = self.tokens * (self.block_rows + 4) * 4 * (self.kernel == "digits")
            return teams * max(self.stages * stage, unfinished)
        if self.persistent:
            tiles = self.block_rows // TILE_ROWS
            meta = 0 if (spec.bits, spec.group) == (2, 128) else meta_bytes(spec)  # WgmmaConfig::kOwnScales
            stage = self.tokens * CHUNK * spec.x_bytes + tiles * (tile_bytes(spec.bits) * (self.ahead == 0) + meta)
            store = 2 * 32 * (64 * 2 + 16) * (self.tokens * (3 - spec.x_bytes) > 64)  # of a warp group
            store += self.tokens * 4 * (spec.x_bytes == 1)  # the tokens' scales
            store += self.cluster * 64 * self.row_tiles * self.tokens * 4
            return (
                1024 + self.stages * stage + self.ahead * 4 * tiles * tile_bytes(spec.bits) + self.warps_n // 4 * store
            )
        if self.kernel == "tile":
            codes = self.warps_n * self.row_tiles * tile_bytes(spec.bits)
            store = self.threads // 32 * self.token_tiles * 8 * max(_PAD_ROWS * 4, self.row_tiles * TILE_ROWS * 2 + 16)
            return max(self.stages * self.tokens * CHUNK + (self.stages // 2 + 1) * codes, store)
        x_bytes = _round_up(self.tokens * (self.warps_k * CHUNK * 2 + 16), 128)
        warp_tiles = self.warps_n * self.warps_k * self.row_tiles
        stage = x_bytes + warp_tiles * tile_bytes(spec.bits) + _round_up(warp_tiles * meta_bytes(spec), 128)
        reduce = self.threads // 32 * self.token_tiles * 8 * _PAD_ROWS * 4
        return max(self.stages * stage, reduce)

    def shape_bytes(self, spec: KernelSpec, groups: int, chunks: int) -> int:
        """Shared memory that depends on the shape, bytes: a block's row groups and chunks (gemm_stream.cuh,
        gemm_digits.cuh)."""
        if not self.walks:
            return 0
        rows = self.row_tiles * TILE_ROWS
        x_bytes = self.tokens * (chunks * CHUNK * 2 + 16)
        slots = (groups + self.warps_k) * self.tokens * (rows + 4) * 4
        if self.kernel == "digits":
            padding = 128 if self.cluster else 32
            x_bytes = _round_up(chunks, self.unit_chunks(spec)) * (2 * self.tokens * CHUNK + padding) + self.tokens * 16
            return x_bytes + groups * rows * 4 + groups * self.tokens * (rows + 4) * 4
        if self.digits:
            raw = CHUNK * 2 * (2 if spec.norm else 1)
            x_bytes = chunks * (self.tokens * CHUNK * 4 + 64 + raw) + self.tokens * 16 + self.warps_k * 16
            slots = groups * rows * self.tokens * 16
        return x_bytes + slots + groups * rows * (4 if spec.bits == 2 else 5)

    def unit_chunks(self, spec: KernelSpec) -> int:
        """Chunks that a team of a stream or digits kernel takes at once; DigitsConfig::kUnit."""
        return (4 if spec.group else 2) if self.cluster else 1

    @property
    def name(self) -> str:
        return (
            f"{self.kernel}_t{self.tokens}_w{self.warps_n}x{self.warps_m}x{self.warps_k}"
            f"_r{self.row_tiles}_s{self.stages}{'_digits' * self.digits}"
            f"{'_cluster' * self.cluster}{f'_a{self.ahead}' * (self.ahead > 0)}"
        )

    def fitted(self, spec: KernelSpec, limit: int) -> GemmConfig:
        """The nearest configuration that fits into `limit` bytes of shared memory: fewer stages, then smaller tiles."""
        smaller = [replace(self, stages=s) for s in range(self.stages, 1, -1)]
        smaller += [replace(self, stages=2, row_tiles=r) for r in (2, 1) if r < self.row_tiles]
        smaller += [replace(self, stages=2, row_tiles=1, warps_k=k) for k in (4, 2, 1) if k < self.warps_k]
        for config in smaller:
            if config.shared_bytes(spec) <= limit:
                return config
        raise BackendError(
            f"GemmConfig {self.name} needs {self.shared_bytes(spec)} bytes of shared memory for {spec.name}; "
            f"{spec.target} has {limit} per block, too little for smaller tiles too. Choose fewer tokens per block."
        )


def tile_bytes(bits: int) -> int:
    """Bytes of codes of one (16-row tile, 128-input chunk)."""
    return TILE_ROWS * CHUNK * bits // 8


def meta_bytes(spec: KernelSpec) -> int:
    """Bytes of group scales (fp16) and zero points (uint8, bits > 2) of one (tile, chunk)."""
    if not spec.group:
        return 0
    return CHUNK // spec.group * TILE_ROWS * (2 if spec.bits == 2 else 3)
