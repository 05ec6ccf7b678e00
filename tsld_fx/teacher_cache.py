"""What a frozen teacher says about each training sample, on disk: computed in the first epoch, read in the others.

A cache is a folder: `cache.json` says what it is made of (data, teacher, shapes), `scores.bin`, `hidden.bin` and
`top_*.bin` hold one row per sample, memory-mapped, and `rows.bin` each row's checksum and the fingerprint of the sample
it belongs to.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tsld_fx.errors import CheckpointError, ConfigError, DataError
from tsld_fx.whole_files import check_folder, whole_folder, write_json

VERSION = 2
KINDS = ("token_scores", "hidden_states", "top_logits")
TOP = ("top_indices", "top_log_probs", "top_rest")  # of a batch, and the files
_ROW = np.dtype([("fingerprint", "<u8"), ("checksum", "<u4"), ("filled", "<u4")])
_PROBES = 64  # samples that are compared when a cache is opened; each one is compared again when it is read
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TeacherRow:
    """A sample's row.

    Attributes:
        scores: float32 [T - 1], the teacher's cross-entropy.
        hidden: [T, H], its head's input, where hidden states are kept.
        top: `indices` [T, k], `log_probs` [T, k] and `rest` [T] of `TopLogits`, where these are kept.
    """

    scores: Tensor
    hidden: Tensor | None = None
    top: tuple[Tensor, ...] | None = None


class TeacherCache:
    """The rows of one data set under one teacher.

    Args:
        folder: made with the first rows; an existing one is checked and continued.
        kind: `token_scores` (4 bytes a token), `hidden_states` (these too, and no teacher runs any more) or
            `top_logits` (scores and the most likely tokens: not even the teacher's head runs any more).
        data: the training samples, all of one length.
        teacher: its content is part of the cache's identity.
        scored: whether the scores are kept (an objective with TSLD) or zeros stand for them.
        count: most likely tokens kept by `top_logits`.

    Raises:
        ConfigError, DataError: an unknown kind, samples that cannot be cached, or a folder made for other data or by
            another teacher.
        CheckpointError: a damaged folder.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        data: Dataset[Any],
        teacher: nn.Module,
        scored: bool = True,
        count: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"teacher_cache={kind!r} is not one of {', '.join(KINDS)}.")
        self.folder, self.kind = Path(folder), kind
        samples = len(data) if hasattr(data, "__len__") and hasattr(data, "__getitem__") else 0  # type: ignore[arg-type]
        if not samples:
            raise DataError("teacher_cache: samples are found again by their number; give a data set with a length.")
        picked = sorted({i * (samples - 1) // max(_PROBES - 1, 1) for i in range(_PROBES)})
        probes = [data[i] for i in picked]
        lengths = {len(item["input_ids"]) for item in probes}
        if len(lengths) > 1:
            raise DataError(
                f"teacher_cache: samples have {min(lengths)} to {max(lengths)} tokens. Cut or pad all to one length."
            )
        digest = hashlib.sha256(b"".join(fingerprint(item).to_bytes(8, "little") for item in probes)).hexdigest()
        self.identity: dict[str, Any] = {
            "version": VERSION, "kind": kind, "samples": samples, "tokens": lengths.pop(), "data": digest,
            "teacher": teacher_digest(teacher), "scored": scored,
        }  # fmt: skip
        if kind == "top_logits":
            self.identity["count"] = count
        self._rows: Any = None
        self._values: dict[str, Any] = {}  # memory maps by name, one row per sample
        self._dtype = torch.float32
        self.opened()

    def opened(self) -> bool:
        """Map the folder if it is there; whether it is."""
        if self._rows is not None:
            return True
        record = self.folder / "cache.json"
        if not record.is_file():
            check_folder(self.folder)
            if self.folder.exists() and any(self.folder.iterdir()):
                raise CheckpointError(
                    f"{self.folder}: the folder is not empty and no teacher cache. Choose another one."
                )
            return False
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
            shapes, self._dtype = stored.pop("shapes"), _DTYPES[stored.pop("dtype")]
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{record}: cannot be read ({error!r}). Delete the folder; it is made anew."
            ) from None
        for name, value in self.identity.items():
            if stored.get(name) != value:
                raise DataError(
                    f"{self.folder}: the teacher cache was made for another run: {name} is {stored.get(name)!r} there "
                    f"and {value!r} here. Delete the folder, or choose another cache folder."
                )
        self._values = {name: self._map(f"{name}.bin", self._stored(name), shape) for name, shape in shapes.items()}
        self._rows = self._map("rows.bin", _ROW, [self.identity["samples"]])
        return True

    def _stored(self, name: str) -> Any:
        """The dtype of a file's values."""
        fixed = {"scores": np.float32, "top_indices": np.int32, "top_log_probs": np.float16, "top_rest": np.float32}
        return fixed.get(name) or _numpy_dtype(self._dtype)

    def _map(self, name: str, dtype: Any, shape: Sequence[int]) -> Any:
        file, size = self.folder / name, int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not file.is_file() or file.stat().st_size != size:
            found = file.stat().st_size if file.is_file() else 0
            raise CheckpointError(f"{file}: {found} bytes instead of {size}. Delete the folder; it is made anew.")
        return np.memmap(file, dtype=dtype, mode="r+", shape=tuple(shape))

    def _create(self, hidden: Tensor | None) -> None:
        samples, tokens = self.identity["samples"], self.identity["tokens"]
        self._dtype = torch.float32 if hidden is None else hidden.dtype
        shapes = {"scores": [samples, tokens - 1]}
        if hidden is not None:
            shapes["hidden"] = [samples, tokens, hidden.shape[-1]]
        if self.kind == "top_logits":
            count = self.identity["count"]
            shapes |= {
                "top_indices": [samples, tokens, count],
                "top_log_probs": [samples, tokens, count],
                "top_rest": [samples, tokens],
            }
        sizes = {f"{n}.bin": int(np.prod(shape)) * np.dtype(self._stored(n)).itemsize for n, shape in shapes.items()}
        with _alone_in(self.folder.parent):
            if self.opened():  # another process was faster
                return
            with whole_folder(self.folder) as folder:
                for name, size in {**sizes, "rows.bin": samples * _ROW.itemsize}.items():
                    with (folder / name).open("wb") as file:
                        os.truncate(file.fileno(), size)
                dtype = str(self._dtype).removeprefix("torch.")
                write_json(folder / "cache.json", {**self.identity, "shapes": shapes, "dtype": dtype})
            self.opened()

    def put(
        self,
        samples: Sequence[int],
        prints: Sequence[int],
        scores: Tensor,
        hidden: Tensor | None = None,
        top: Sequence[Tensor] | None = None,
    ) -> None:
        """Write the rows of some samples.

        Args:
            prints: fingerprints of the samples, as signed 64-bit integers.
            scores: [B, T - 1]; hidden: [B, T, H] where the cache keeps hidden states.
            top: [B, T, k], [B, T, k] and [B, T] where it keeps the most likely tokens.
        """
        hidden = hidden.detach().cpu() if hidden is not None and self.kind == "hidden_states" else None
        if scores.shape[1] != self.identity["tokens"] - 1:
            raise DataError(
                f"teacher_cache: a batch has {scores.shape[1] + 1} tokens, the samples {self.identity['tokens']}. "
                "Cut or pad all samples to one length, before the collator."
            )
        if not self.opened():
            self._create(hidden)
        rows = {"scores": scores.detach().float().cpu().numpy()}
        if hidden is not None:
            rows["hidden"] = _as_numpy(hidden.to(self._dtype))
        if top is not None:
            rows |= {name: t.detach().cpu().numpy() for name, t in zip(TOP, top, strict=True)}
        for place, (sample, mark) in enumerate(zip(samples, prints, strict=True)):
            for name, values in rows.items():
                self._values[name][sample] = values[place]
            self._rows[sample] = (mark % 2**64, self._checksum(sample), 1)

    def _checksum(self, sample: int) -> int:
        value = 0
        for values in self._values.values():
            value = zlib.crc32(values[sample].tobytes(), value)
        return value

    def get(self, sample: int, mark: int) -> TeacherRow | None:
        """The row of a sample, None while there is none.

        Raises:
            DataError: the row was made for other tokens.
            CheckpointError: the row is damaged.
        """
        if not self.opened() or not self._rows[sample]["filled"]:
            return None
        if int(self._rows[sample]["fingerprint"]) != mark % 2**64:
            raise DataError(
                f"{self.folder}: sample {sample} is not the one that the teacher cache was made for. Delete the "
                "folder, and cache only data sets that give the same sample for the same number each time."
            )
        if int(self._rows[sample]["checksum"]) != self._checksum(sample):
            raise CheckpointError(f"{self.folder}: the row of sample {sample} is damaged. Delete the folder.")
        found = {name: np.array(values[sample]) for name, values in self._values.items()}
        hidden = _as_torch(found["hidden"], self._dtype) if "hidden" in found else None
        top = tuple(torch.from_numpy(found[name]) for name in TOP) if TOP[0] in found else None
        return TeacherRow(torch.from_numpy(found["scores"]), hidden, top)

    def filled(self) -> int:
        """Samples that have a row."""
        return int(self._rows["filled"].sum()) if self.opened() else 0

    def __getstate__(self) -> dict[str, Any]:  # a loader's worker maps the files itself
        return self.__dict__ | {"_rows": None, "_values": {}}


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def fingerprint(item: Mapping[str, Any]) -> int:
    """64 bits over everything of a sample that the teacher's row depends on."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        if item.get(name) is not None:
            digest.update(name.encode() + np.asarray(item[name], dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little")


def teacher_digest(teacher: nn.Module) -> str:
    """A digest of a model's tensors: names, shapes, exact sums of their bits, and 256 values of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        flat = tensor.detach().contiguous().view(-1)
        bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        total = int(bits.sum(dtype=torch.int64)) if bits.numel() else 0
        some = bits[:: max(1, bits.numel() // 256)][:256].to(torch.int64).cpu().numpy().tobytes()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {total}".encode() + some)
    return digest.hexdigest()


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return np.float32 if dtype == torch.float32 else np.int16


def _as_numpy(tensor: Tensor) -> Any:
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy()


def _as_torch(row: Any, dtype: torch.dtype) -> Tensor:
    value = torch.from_numpy(row)
    return value if dtype == torch.float32 else value.view(dtype)
