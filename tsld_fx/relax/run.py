#!/usr/bin/env python3
"""Run a program folder with numpy, apache-tvm-ffi and TVM's runtime library: no torch, no tsld_fx, no compiler.

`tsld_fx.relax.compile` puts a copy of this file into each folder, so that the folder is all that has to travel:

    python my-program/run.py --ids "5 6 7" --max-new-tokens 16
    python my-program/run.py --prompt "Once upon a time" --tokenizer tokenizer.json    # needs `pip install tokenizers`

In Python: `Program("my-program")(input_ids, attention_mask)` and `.generate(input_ids, 16)`, on numpy arrays.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
CPU_FLAGS = {  # level of the x86-64 psABI -> what /proc/cpuinfo shows; best first
    "x86-64-v4": ("avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": ("avx2", "fma", "bmi2", "f16c", "movbe"),
    "x86-64-v2": ("sse4_2", "popcnt", "ssse3"),
}
_ALIGNMENT = 64  # bytes; compiled code loads whole vectors
_CPU, _CUDA, _POOLED = 1, 2, 2  # kDLCPU, kDLCUDA, the virtual machine's pooled allocator


class ProgramError(Exception):
    """A folder that is no whole program, or that this machine cannot run, or inputs that do not fit it."""


def cpu_flags() -> set[str]:
    """Feature names that /proc/cpuinfo shows; empty where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    line = next((text for text in lines if text.startswith(("flags", "Features"))), ":")
    return set(line.split(":", 1)[1].split())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a program folder, checked against this machine.

    Raises:
        ProgramError: no program, another format version, or a CPU without the features that it was built for.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ProgramError(
            f"{folder}: manifest.json is missing or unreadable, so this is no whole program. Compile it again."
        ) from error
    if manifest.get("format_version") != FORMAT:
        raise ProgramError(
            f"{folder}: format version {manifest.get('format_version')}, this loader reads {FORMAT}. Compile it again "
            "with the tsld_fx that runs it, or run it with the run.py that lies in the folder."
        )
    target = manifest["target"]
    missing = sorted(set(target["flags"]) - cpu_flags())
    if target["machine"] != platform.machine() or missing:
        lack = f" without {', '.join(missing)}" if missing else ""
        raise ProgramError(
            f"{folder}: built for {target['machine']} CPUs of level {target['mcpu']}, this is a {platform.machine()} "
            f"CPU{lack}. Compile it for this machine, e.g. target='llvm:x86-64-v2'."
        )
    return manifest


class Program:
    """A compiled model.

    Args:
        folder: what `tsld_fx.relax.compile` wrote.
        device: `cpu`, or `cuda` / `cuda:1` for programs built for CUDA; default: what it was built for.
        threads: CPU threads of TVM's pool; None leaves them to TVM (TVM_NUM_THREADS, else the number of cores).
        verify: read both files and compare their checksums; False starts faster.

    Raises:
        ProgramError: it says what does not fit, and what to do.
    """

    def __init__(
        self, folder: str | Path, *, device: str | None = None, threads: int | None = None, verify: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._check_files(verify)
        kind = self.manifest["target"]["kind"]
        self.device = device or ("cuda" if kind == "cuda" else "cpu")
        if self.device.partition(":")[0] != ("cuda" if kind == "cuda" else "cpu"):
            raise ProgramError(f"{self.folder}: built for {kind}, cannot run on {self.device!r}. Compile it for that.")
        self._ffi = _load_runtime(self.folder, self.manifest, kind == "cuda")
        self._machine = self._start()
        if threads is not None:
            self._ffi.get_global_func("runtime.config_threadpool")(1, threads)
        self._weights = self._load_weights()

    def _check_files(self, verify: bool) -> None:
        for name, entry in self.manifest["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else -1
            damaged = size != entry["bytes"]
            if not damaged and verify:
                damaged = hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]
            if damaged:
                raise ProgramError(
                    f"{path}: {'missing' if size < 0 else f'{size} bytes, damaged'} (expected {entry['bytes']} bytes). "
                    "Copy the whole folder again, or compile it again."
                )

    def _start(self) -> Any:
        library = self._ffi.load_module(str((self.folder / "model.so").resolve()))
        machine = library["vm_load_executable"]()
        devices: tuple[int, ...] = (_CPU, 0, _POOLED)
        if self.device != "cpu":
            devices = (_CUDA, int(self.device.partition(":")[2] or 0), _POOLED, *devices)
        try:
            machine["vm_initialization"](*devices)
        except Exception as error:
            raise ProgramError(
                f"{self.folder}: TVM's virtual machine does not start on {self.device}: {str(error).strip()[:300]} "
                "For CUDA, a driver of CUDA 12 or later and libtvm_runtime_cuda.so are needed."
            ) from error
        return machine

    def _load_weights(self) -> dict[str, Any]:
        entries = self.manifest["weights"]
        if not entries:
            return {}
        data = np.memmap(self.folder / "weights.bin", dtype=np.uint8, mode="c")  # pages are read when they are used
        found = {}
        for entry in entries:
            raw = data[entry["offset"] : entry["offset"] + entry["bytes"]]
            array = raw.view(entry["dtype"]).reshape(entry["shape"]) if entry["bytes"] else np.empty(entry["shape"])
            found[entry["name"]] = self._to_device(array)
        self._data = data
        return found

    def _to_device(self, array: np.ndarray) -> Any:
        if self.device == "cpu" and array.size:
            return self._ffi.from_dlpack(array)
        kind, _, index = self.device.partition(":")
        allocate = self._ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        dtype = self._ffi.dtype(str(array.dtype))
        made = allocate(self._ffi.Shape(array.shape), dtype, self._ffi.device(kind, int(index or 0)), None)
        if array.size:  # what has no elements has strides in numpy that TVM does not call compact
            self._ffi.get_global_func("runtime.TVMTensorCopyFromTo")(self._ffi.from_dlpack(array), made)
        return made

    def _to_host(self, tensor: Any) -> np.ndarray:
        if self.device == "cpu":
            return np.from_dlpack(tensor)
        host = _aligned(tuple(tensor.shape), np.dtype(str(tensor.dtype)))
        self._ffi.get_global_func("runtime.TVMTensorCopyFromTo")(tensor, self._ffi.from_dlpack(host))
        return host

    @property
    def functions(self) -> dict[str, Any]:
        """Name -> inputs with their dtypes and shapes (a name for a size that is free) and names of the weights."""
        return self.manifest["functions"]

    def call(self, name: str, *inputs: Any) -> list[Any]:
        """Run a function on TVM tensors or numpy arrays; returns TVM tensors (on the program's device).

        Raises:
            ProgramError: no such function, or inputs of other shapes than it was built for.
        """
        if name not in self.functions:
            raise ProgramError(f"{self.folder}: no function {name!r}; there are {', '.join(self.functions)}.")
        signature = self.functions[name]
        check_shapes(str(self.folder), name, signature["inputs"], inputs)
        tensors = [self._to_device(_copied(i)) if isinstance(i, np.ndarray) else i for i in inputs]
        result = self._machine[name](*tensors, *(self._weights[weight] for weight in signature["weights"]))
        return list(result) if not hasattr(result, "shape") else [result]

    def _inputs(self, input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
        ids = np.ascontiguousarray(input_ids, dtype=np.int64)
        ids = ids[None] if ids.ndim == 1 else ids
        mask = np.ones_like(ids) if attention_mask is None else np.ascontiguousarray(attention_mask, dtype=np.int64)
        if ids.ndim != 2 or mask.shape != ids.shape or ids.size == 0:
            raise ProgramError(
                f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} must have one shape "
                "[batch, tokens]."
            )
        vocabulary = self.manifest["vocabulary"]
        if ids.min() < 0 or (vocabulary and ids.max() >= vocabulary):
            raise ProgramError(f"input_ids lie in [{ids.min()}, {ids.max()}]; the model has {vocabulary} tokens.")
        rows = self.manifest["max_rows"]
        if rows and ids.size > rows:
            raise ProgramError(
                f"input_ids has {ids.size} tokens; compiled for {rows} at once. Compile with max_rows=None."
            )
        return ids, mask

    def _check_length(self, tokens: int, what: str) -> None:
        limit = self.manifest["max_tokens"]
        if limit and tokens > limit:
            raise ProgramError(f"{what} {tokens} tokens; this program takes at most {limit}. Shorten the input.")

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> np.ndarray:
        """Logits float32 [B, T, vocabulary] of input_ids int [B, T] (attention_mask: 1 where a token counts).

        Raises:
            ProgramError: the program was built without `main`, or the inputs do not fit it.
        """
        ids, mask = self._inputs(input_ids, attention_mask)
        self._check_length(ids.shape[1], "input_ids has")
        return self._to_host(self.call("main", ids, mask)[0])

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        attention_mask: Any = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
    ) -> np.ndarray:
        """Greedy generation with a KV cache: int64 [B, T + new], prompts padded on the left.

        A sequence that has produced an end token is filled up with the padding token. The two default to the model's.

        Raises:
            ProgramError: the program was built without generation, or the inputs do not fit it.
        """
        if "prefill" not in self.functions:
            raise ProgramError(f"{self.folder}: built without generation. Compile with generation=True.")
        ids, mask = self._inputs(input_ids, attention_mask)
        self._check_length(ids.shape[1] + max_new_tokens, "prompt and new tokens make")
        ends = self.manifest["eos_token_id"] if eos_token_id is None else eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = self.manifest["pad_token_id"] if pad_token_id is None else pad_token_id
        pad = ends[0] if pad is None and ends else pad
        cache = self.manifest["cache"]
        empty = np.zeros((len(ids), cache["kv_heads"], 0, cache["head_dim"]), cache["dtype"])
        state: list[Any] = [empty] * (2 * cache["layers"])
        done, out, step = np.zeros(len(ids), dtype=bool), ids, ids
        for index in range(max_new_tokens):
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -step.shape[1] :]
            logits, *state = self.call("prefill" if index == 0 else "decode", step, mask, positions, *state)
            chosen = self._to_host(logits)[:, -1].argmax(-1)
            chosen = np.where(done, pad if pad is not None else chosen, chosen)
            done |= np.isin(chosen, ends)
            step = chosen[:, None].astype(np.int64)
            out, mask = np.concatenate([out, step], 1), np.concatenate([mask, np.ones_like(step)], 1)
            if ends and done.all():
                break
        return out


def check_shapes(where: str, function: str, expected: list[dict[str, Any]], inputs: tuple) -> None:
    """Refuse inputs whose shapes a compiled function does not take.

    Raises:
        ProgramError: it names the input, its shape and the one that was compiled.
    """
    if len(inputs) != len(expected):
        raise ProgramError(f"{where}: {function} takes {len(expected)} inputs, got {len(inputs)}.")
    for entry, value in zip(expected, inputs, strict=True):
        shape = tuple(value.shape)
        fixed = zip(entry["shape"], shape, strict=False)
        if len(shape) != len(entry["shape"]) or any(isinstance(size, int) and size != got for size, got in fixed):
            raise ProgramError(
                f"{where}: {function} was compiled for {entry['name']} of shape {entry['shape']}, got {list(shape)}. "
                "Give that shape, or compile with batch=None, tokens=None for any size."
            )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copied(array: np.ndarray) -> np.ndarray:
    copy = _aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def _load_runtime(folder: Path, manifest: dict[str, Any], cuda: bool) -> Any:
    """tvm_ffi with TVM's runtime library loaded: the folder's own copy, else the one of an installed apache-tvm."""
    for package, wanted in manifest["versions"].items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # the folder may bring the library itself; said below if there is none
        if found.split(".")[:2] != wanted.split(".")[:2]:
            raise ProgramError(
                f"{folder}: compiled with {package} {wanted}, here is {found}. `pip install {package}=={wanted}`, or "
                "compile it again."
            )
    try:
        import tvm_ffi
    except ImportError as error:
        wanted = manifest["versions"]["apache-tvm-ffi"]
        raise ProgramError(f"{folder}: apache-tvm-ffi is missing. `pip install apache-tvm-ffi=={wanted}`.") from error
    leave_threads_alone()
    if cuda:
        _load_cudart(folder)
    for name in ("libtvm_runtime.so", *(["libtvm_runtime_cuda.so"] if cuda else [])):
        path = next((p for p in (installed_library(name), folder / name) if p is not None and p.is_file()), None)
        if path is None:
            raise ProgramError(
                f"{folder}: {name} is neither in the folder nor in an installed apache-tvm. Compile with runtime=True, "
                f"or `pip install apache-tvm=={manifest['versions']['apache-tvm']}`."
            )
        try:
            ctypes.CDLL(str(path.resolve()), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ProgramError(f"{path} does not load here: {error}.") from error
    return tvm_ffi


def leave_threads_alone() -> None:
    """Keep TVM from pinning the calling thread to one core, which every thread made later (torch's) would inherit.

    TVM reads this when its thread pool starts; TVM_BIND_THREADS=1 in the environment asks for pinning.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def _load_cudart(folder: Path) -> None:
    """CUDA's runtime library, from the system or from NVIDIA's Python packages."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    packaged = [str(path) for place in places for path in sorted(Path(place).glob("*/lib/libcudart.so.13"))]
    for name in ("libcudart.so.13", *packaged, "/usr/local/cuda/lib64/libcudart.so.13"):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
    raise ProgramError(f"{folder}: libcudart.so.13 is not here. `pip install nvidia-cuda-runtime`, or install CUDA 13.")


def installed_library(name: str) -> Path | None:
    spec = importlib.util.find_spec("tvm")  # finds, does not import
    return Path(spec.origin).parent / "lib" / name if spec is not None and spec.origin else None


def main() -> None:
    """The console command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="default: this file's")
    parser.add_argument("--ids", help="token numbers of the prompt, separated by blanks or commas")
    parser.add_argument("--prompt", help="text of the prompt; needs the package tokenizers and --tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; default: the one in the folder")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", help="cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--time", action="store_true", help="print seconds to standard error")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    try:
        tokenizer = _tokenizer(arguments) if arguments.prompt is not None else None
        ids = tokenizer.encode(arguments.prompt).ids if tokenizer else _numbers(arguments.ids)
        program = Program(arguments.folder, device=arguments.device, threads=arguments.threads)
        loaded = time.perf_counter()
        out = program.generate([ids], arguments.max_new_tokens)[0].tolist()
    except ProgramError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(tokenizer.decode(out) if tokenizer else " ".join(map(str, out)))
    if arguments.time:
        ended = time.perf_counter()
        print(f"start {loaded - begun:.3f} s, {len(out) - len(ids)} tokens {ended - loaded:.3f} s", file=sys.stderr)


def _numbers(text: str | None) -> list[int]:
    parts = (text or "").replace(",", " ").split()
    if not parts or not all(part.isdigit() for part in parts):
        raise ProgramError('give the prompt as --ids "5 6 7" or --prompt TEXT.')
    return [int(part) for part in parts]


def _tokenizer(arguments: argparse.Namespace) -> Any:
    path = arguments.tokenizer or arguments.folder / "tokenizer.json"
    if not path.is_file():
        raise ProgramError(f"--prompt needs a tokenizer: {path} does not exist. Name one with --tokenizer.")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ProgramError("--prompt needs the package tokenizers: `pip install tokenizers`, or give --ids.") from error
    return Tokenizer.from_file(str(path))


if __name__ == "__main__":
    main()
