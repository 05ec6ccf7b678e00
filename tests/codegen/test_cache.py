"""The kernel cache: content keys, concurrent and killed writers, bounds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tsld_fx.codegen.cache import KernelCache, cache_key, included_headers
from tsld_fx.codegen.compiler import KernelBuildError


@dataclass
class FakeCompiler:
    version: str = "fake 1"
    built: list[str] = field(default_factory=list)

    def flags(self, target: str) -> list[str]:
        return [f"-arch={target}"]

    def compile(self, source: str, target: str) -> tuple[bytes, str]:
        self.built.append(source)
        return f"binary of {source}".encode() * 100, "log"


def test_second_request_is_served_from_disk(tmp_path: Path) -> None:
    compiler, cache = FakeCompiler(), KernelCache(tmp_path, 1 << 20)
    first = cache.get_or_build("a", "sm_80", compiler)
    assert cache.get_or_build("a", "sm_80", compiler) == first
    assert compiler.built == ["a"]


def test_key_covers_everything_that_determines_the_binary(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text('#include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text("int x;\n")
    source = '#include "a.cuh"\n'
    assert list(included_headers(source, tmp_path)) == ["a.cuh", "b.cuh"]

    def key(source: str = source, target: str = "sm_80", version: str = "1") -> str:
        return cache_key(source, target, FakeCompiler(version), tmp_path)

    keys = {key(), key(target="sm_90a"), key(version="2"), key(source + "\n")}
    (tmp_path / "b.cuh").write_text("int y;\n")
    assert len(keys | {key()}) == 5


def test_damaged_entry_is_built_again(tmp_path: Path) -> None:
    compiler, cache = FakeCompiler(), KernelCache(tmp_path, 1 << 20)
    good = cache.get_or_build("a", "sm_80", compiler)
    ((_, _, entry),) = cache.entries()
    (entry / "kernel.bin").write_bytes(b"cut")
    assert cache.get_or_build("a", "sm_80", compiler) == good
    (entry / "info.json").unlink()
    assert cache.get_or_build("a", "sm_80", compiler) == good
    assert len(compiler.built) == 3


def test_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    compiler, cache = FakeCompiler(), KernelCache(tmp_path, 1 << 30)
    for age, source in ((300, "old"), (200, "used"), (100, "new")):
        cache.get_or_build(source, "sm_80", compiler)
        key = cache_key(source, "sm_80", compiler)
        os.utime(tmp_path / key, (time.time() - age,) * 2)
    cache.get_or_build("used", "sm_80", compiler)
    size = cache.entries()[0][1]
    small = KernelCache(tmp_path, int(2.5 * size))
    small.trim()
    left = {entry.name for _, _, entry in small.entries()}
    assert left == {cache_key(s, "sm_80", compiler) for s in ("used", "new")}


def test_clear_and_stale_leftovers(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, 1 << 20)
    stale, fresh = tmp_path / ".tmp-1-a", tmp_path / ".tmp-2-b"
    stale.mkdir()
    fresh.mkdir()
    os.utime(stale, (time.time() - 7200,) * 2)
    cache.get_or_build("a", "sm_80", FakeCompiler())
    assert not stale.exists() and fresh.exists() and len(cache.entries()) == 1
    cache.clear()
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from pathlib import Path
from tsld_fx.codegen.cache import KernelCache
class Compiler:
    version = "fake"
    def flags(self, target): return []
    def compile(self, source, target):
        time.sleep(float(sys.argv[2])); return source.encode() * 200000, "log"
cache = KernelCache(Path(sys.argv[1]), 1 << 30)
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    assert cache.get_or_build(f"kernel {i} ", "sm_80", Compiler())[0] == f"kernel {i} ".encode() * 200000
"""


def writer(folder: Path, delay: float, count: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(delay), str(count)], stdout=subprocess.PIPE, text=True
    )


def test_concurrent_processes(tmp_path: Path) -> None:
    processes = [writer(tmp_path, 0.01, 8) for _ in range(4)]
    assert [p.wait(120) for p in processes] == [0] * 4
    assert len(KernelCache(tmp_path, 1 << 30).entries()) == 8
    assert not list(tmp_path.glob(".tmp-*"))


def test_killed_writers_leave_only_whole_entries(tmp_path: Path) -> None:
    for pause in (0.0, 0.01, 0.03, 0.05):
        process = writer(tmp_path, 0.0, 10000)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    for _, _, entry in KernelCache(tmp_path, 1 << 30).entries():
        assert json.loads((entry / "info.json").read_text())["target"] == "sm_80"
        assert (entry / "kernel.bin").stat().st_size > 0
    assert writer(tmp_path, 0.0, 3).wait(120) == 0  # nothing is locked


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(KernelBuildError, match="TSLD_CACHE_DIR"):
        KernelCache(blocked / "kernels", 1 << 20).get_or_build("a", "sm_80", FakeCompiler())
