"""A shared library of compiled kernels and launchers for the linear layers of one model, made without a GPU.

Each (specification, N, K) becomes one function `tsld_linear_<spec>_<N>x<K>` with the tvm-ffi calling convention:

    f(x [m, K], codes, meta | None, row_scale, row_zero | None, bias | None, y [m, N], partial | None, counters | None)

on the current stream of x's device, and `..._plan(m, capability, multiprocessors)`, which tells what it would launch.
The library holds machine code for the architectures asked for and PTX for newer ones; it needs the CUDA driver and
libtvm_ffi, nothing else. Plans are tables here: what `choose` says for each number of tokens, on a full chip of each
architecture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tsld_fx.codegen.build import build_kernel
from tsld_fx.codegen.compiler import KernelBuildError, find_compiler
from tsld_fx.codegen.config import GemmConfig, shared_limit
from tsld_fx.codegen.cuda_gemm import GemmParams
from tsld_fx.codegen.render import environment, kernel_name
from tsld_fx.codegen.select_config import Plan, choose
from tsld_fx.codegen.spec import CHUNK, TILE_ROWS, KernelSpec
from tsld_fx.cuda_templates import TEMPLATE_DIR
from tsld_fx.errors import BackendError

MULTIPROCESSORS = {80: 108, 86: 84, 87: 16, 89: 142, 90: 132, 100: 148, 120: 170}  # of a full chip: A100, H100, ...
MANY_TOKENS = 1 << 16  # plans are looked up one by one to here; beyond, the output alone fills every machine
_LAST = 2**31 - 1
_ARCH = re.compile(r"^sm_(\d+)a?$")


@dataclass(frozen=True)
class LinearKernel:
    """What one function of the library computes; `spec.target` is not looked at."""

    spec: KernelSpec
    n: int
    k: int

    @property
    def name(self) -> str:
        """The function's name in the library."""
        return f"tsld_linear_{self.spec.name}_{self.n}x{self.k}"


def targets_of(arch: Sequence[str]) -> tuple[str, ...]:
    """("sm_80", "sm_90") -> ("sm_90a", "sm_80", "compute_80"), in the order in which a device looks for its own.

    Raises:
        BackendError: no architecture, or one that the kernels do not serve.
    """
    numbers = []
    for name in [arch] if isinstance(arch, str) else arch:
        match = _ARCH.match(str(name))
        if match is None or int(match.group(1)) < 80:
            raise BackendError(
                f"build_runtime_module: arch {name!r} is none that the kernels serve. Use 'sm_80', 'sm_86', 'sm_89', "
                "'sm_90' or later."
            )
        numbers.append(int(match.group(1)))
    if not numbers:
        raise BackendError("build_runtime_module: arch is empty. Name at least one, such as ('sm_80', 'sm_90').")
    numbers = sorted(set(numbers), reverse=True)
    return (*("sm_90a" if n == 90 else f"sm_{n}" for n in numbers), f"compute_{numbers[-1]}")


def plan_ranges(spec: KernelSpec, n: int, k: int, max_tokens: int | None = None) -> list[tuple[int, Plan]]:
    """[(largest number of tokens, plan)] in rising order, as `choose` says for a full chip of the architecture."""
    known = [c for c in MULTIPROCESSORS if c <= spec.capability]
    multiprocessors = MULTIPROCESSORS[max(known)]

    def plan(m: int) -> Plan:
        found = choose(spec, n, k, m, multiprocessors)
        return found if found.splits > 1 or found.config.kernel not in ("mma", "tile") else replace(found, per_sm=1)

    last = _LAST if max_tokens is None else max_tokens
    points = [m for m in (*range(1, 513), *range(576, MANY_TOKENS + 1, 64)) if m < last] + [last]
    ranges: list[tuple[int, Plan]] = []
    previous, current = points[0], plan(points[0])
    for point in points[1:]:
        found = plan(point)
        if found != current:
            low, high = previous, point  # plan(low) == current != plan(high)
            while high - low > 1:
                middle = (low + high) // 2
                if plan(middle) == current:
                    low = middle
                else:
                    high = middle
            ranges.append((low, current))
            if high != point:  # between two thresholds
                found_high = plan(high)
                if found_high != found:
                    ranges.append((point - 1, found_high))
        previous, current = point, found
    return [*ranges, (last, current)]


def shared_bytes(kernels: Sequence[LinearKernel], targets: Sequence[str], max_tokens: int | None = None) -> list[int]:
    """Most dynamic shared memory that a launch takes, bytes, for each target."""
    most = [0] * len(targets)
    for kernel, index, ranges in _tables(kernels, targets, max_tokens):
        spec = replace(kernel.spec, target=targets[index])
        chip = MULTIPROCESSORS[max(c for c in MULTIPROCESSORS if c <= spec.capability)]
        tiles, chunks = -(-kernel.n // TILE_ROWS), -(-kernel.k // CHUNK)
        for m, plan in ranges:
            most[index] = max(most[index], plan.shared_bytes(spec, m, tiles, chunks, chip))
    return most


def _tables(
    kernels: Sequence[LinearKernel], targets: Sequence[str], max_tokens: int | None
) -> Iterator[tuple[LinearKernel, int, list[tuple[int, Plan]]]]:
    """(function, index of the target, its plans) of every function and target."""
    for kernel in kernels:
        for index, target in enumerate(targets):
            spec = replace(kernel.spec, target=target)
            yield kernel, index, plan_ranges(spec, kernel.n, kernel.k, max_tokens)


def _c_type(name: str) -> str:
    return "const void*" if name in ("x", "weights", "meta", "row_scale", "row_zero", "bias") else "void*"


def _fields() -> list[tuple[str, str]]:
    """GemmParams as C++ fields."""
    c = {"c_void_p": None, "c_int": "int", "c_long": "int64_t", "c_longlong": "int64_t", "c_float": "float"}
    return [(c[kind.__name__] or _c_type(name), name) for name, kind, *_ in GemmParams._fields_]


def build_library(
    kernels: Sequence[LinearKernel], targets: Sequence[str], out: Path, max_tokens: int | None = None
) -> list[str]:
    """Compile the kernels of these layers for these targets and link them into the shared library `out`.

    Returns:
        The names of the compiled kernels.

    Raises:
        KernelBuildError: no CUDA compiler or host compiler, no tvm-ffi, or something does not compile.
    """
    host, flags = host_compiler()
    find_compiler()
    with tempfile.TemporaryDirectory(prefix="tsld-module-") as folder:
        source, names = module_source(kernels, targets, Path(folder), max_tokens)
        _compile_host([*host, *flags], source, Path(folder), out)
    return names


def module_source(
    kernels: Sequence[LinearKernel], targets: Sequence[str], folder: Path, max_tokens: int | None = None
) -> tuple[str, list[str]]:
    """Compile the kernels of these layers into `folder` -> (C++ source of images and launchers, kernels' names).

    Raises:
        KernelBuildError: a kernel does not compile.
    """
    plans = list(_tables(kernels, targets, max_tokens))
    wanted: dict[tuple[KernelSpec, GemmConfig], None] = {}  # in order, without a target
    needed: dict[tuple[KernelSpec, GemmConfig, int], None] = {}
    for kernel, index, ranges in plans:
        for _, plan in ranges:
            wanted[replace(kernel.spec, target="sm_80"), plan.config] = None
            needed[replace(kernel.spec, target="sm_80"), plan.config, index] = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = [pool.submit(build_kernel, replace(s, target=targets[t]), c) for s, c, t in needed]
        binaries = [build.result()[0] for build in builds]
    symbols = {}
    for number, (key, binary) in enumerate(zip(needed, binaries, strict=True)):
        (folder / f"{number}.bin").write_bytes(binary)
        symbols[key] = f"tsld_image_{number}"
    names = [f"{kernel_name(spec, config)} ({targets[index]})" for spec, config, index in needed]
    return _render(kernels, targets, plans, list(wanted), symbols, folder), names


def _render(
    kernels: Sequence[LinearKernel],
    targets: Sequence[str],
    plans: list[tuple[LinearKernel, int, list[tuple[int, Plan]]]],
    wanted: list[tuple[KernelSpec, GemmConfig]],
    symbols: dict[tuple[KernelSpec, GemmConfig, int], str],
    folder: Path,
) -> str:
    number = {key: index for index, key in enumerate(wanted)}
    ranges: dict[LinearKernel, list[list[dict[str, int]]]] = {kernel: [] for kernel in kernels}
    for kernel, _, table in plans:
        spec = replace(kernel.spec, target="sm_80")
        rows = [
            {"m_max": m, "kernel": number[spec, plan.config], "splits": plan.splits, "per_sm": plan.per_sm}
            for m, plan in table
        ]
        ranges[kernel].append(rows)
    return environment().get_template("runtime_module.cc.j2").render(
        params=_fields(),
        images=[{"symbol": s, "file": str(folder / f"{i}.bin")} for i, s in enumerate(symbols.values())],
        kernels=[
            {
                "name": kernel_name(spec, config), "kind": f"k{config.kernel.title()}", "threads": config.threads,
                "block_rows": config.block_rows, "block_tokens": config.block_tokens, "tokens": config.tokens,
                "warps_k": config.warps_k, "digits": int(config.digits), "cluster": int(config.cluster),
                "unit": config.unit_chunks(spec),
                "shared_bytes": config.shared_bytes(spec),
                "images": [symbols.get((spec, config, t), "nullptr") for t in range(len(targets))],
            }
            for spec, config in wanted
        ],
        targets=[
            {
                "name": name, "capability": KernelSpec("fp16", 2, target=name).capability,
                "exact": "true" if name.endswith("a") else "false",
                "ptx": "true" if name.startswith("compute") else "false",
                "max_shared": shared_limit(KernelSpec("fp16", 2, target=name).capability),
            }
            for name in targets
        ],
        linears=[
            {
                "name": kernel.name, "n": kernel.n, "k": kernel.k, "bits": kernel.spec.bits,
                "bf16": "true" if kernel.spec.activation == "bf16" else "false", "ranges": ranges[kernel],
            }
            for kernel in kernels
        ],
    )  # fmt: skip


def host_compiler() -> tuple[list[str], list[str]]:
    """-> (command, flags with tvm-ffi's headers and library)."""
    command = os.environ.get("CXX", "").split() or [p for p in map(shutil.which, ("g++", "clang++", "c++")) if p][:1]
    if not command:
        raise KernelBuildError(
            "build_runtime_module: no C++ compiler found for the launchers. Install g++, or name one with CXX. "
            "Machines that load the module need none."
        )
    try:
        from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi
    except ImportError:
        raise KernelBuildError(
            "build_runtime_module: the package apache-tvm-ffi is missing. Run `pip install apache-tvm-ffi`."
        ) from None
    library = Path(find_libtvm_ffi())
    includes = [f"-I{TEMPLATE_DIR}", f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-attributes", *includes]
    return command, [*flags, f"-L{library.parent}", "-ltvm_ffi", "-ldl"]


def _compile_host(command: list[str], source: str, folder: Path, out: Path) -> None:
    unit = folder / "module.cc"
    unit.write_text(source)
    split = next(i for i, flag in enumerate(command) if flag.startswith("-L"))
    whole = [*command[:split], str(unit), "-o", str(out), *command[split:]]
    try:
        done = subprocess.run(whole, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelBuildError(
            f"build_runtime_module: the C++ compiler {command[0]} does not run ({error}). Name another with CXX."
        ) from error
    if done.returncode != 0:
        raise KernelBuildError(
            f"build_runtime_module: {command[0]} ended with code {done.returncode} on the launchers:\n"
            f"{(done.stdout + done.stderr).strip()}\nA C++17 compiler and apache-tvm-ffi 0.1.15 or later are needed."
        )
