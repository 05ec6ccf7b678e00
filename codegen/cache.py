"""Compiled kernels on disk, keyed by content.

An entry is a folder named by the hash of everything that determines the binary: source, every header it includes
(recursively), compiler version, flags, target. It is written to a temporary folder and renamed, so that a reader
sees a whole entry or none; there are no locks that a killed process could leave behind. Two processes that build
the same kernel at once both compile, and the second rename finds the entry there and drops its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tsld_fx.codegen.compiler import Compiler, KernelBuildError
from tsld_fx.cuda_templates import TEMPLATE_DIR

FORMAT = 1
_STALE_SECONDS = 3600.0
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)


class CacheError(KernelBuildError):
    """The folder that compiled kernels are kept in cannot be used."""


def default_folder() -> Path:
    """TSLD_CACHE_DIR, else the user's cache folder."""
    named = os.environ.get("TSLD_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsld_fx" / "kernels"


def default_limit() -> int:
    """Bytes that the cache may take: TSLD_CACHE_MAX_MB (default 512) MiB."""
    named = os.environ.get("TSLD_CACHE_MAX_MB") or "512"
    if not named.isdecimal():
        raise CacheError(f"TSLD_CACHE_MAX_MB={named!r} is not a whole number of MiB. Set one, such as 512.")
    return int(named) << 20


def included_headers(source: str, root: Path = TEMPLATE_DIR) -> dict[str, str]:
    """Every quoted header that `source` includes, recursively: {path relative to root: text}, sorted by path."""
    found: dict[str, str] = {}
    pending = _INCLUDE.findall(source)
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = (root / name).read_text()
            pending += _INCLUDE.findall(found[name])
    return dict(sorted(found.items()))


def cache_key(source: str, target: str, compiler: Compiler, root: Path = TEMPLATE_DIR) -> str:
    """Hash of everything that determines the binary; 32 hexadecimal digits."""
    parts = [FORMAT, source, target, compiler.version, compiler.flags(target), included_headers(source, root)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def content_key(source: str, target: str, root: Path = TEMPLATE_DIR) -> str:
    """Hash of what is compiled, whatever compiles it."""
    parts = [FORMAT, source, target, included_headers(source, root)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class KernelCache:
    """A bounded folder of compiled kernels. The least recently used entries go first."""

    folder: Path
    limit_bytes: int

    @classmethod
    def default(cls) -> KernelCache:
        return cls(default_folder(), default_limit())

    def get_or_build(
        self, source: str, target: str, compiler: Compiler, root: Path = TEMPLATE_DIR
    ) -> tuple[bytes, str]:
        """-> (binary, compiler log), from disk if it is there and whole. `root`: where its headers lie."""
        key = cache_key(source, target, compiler, root)
        hit = self._read(key)
        if hit is not None:
            return hit
        binary, log = compiler.compile(source, target)
        info = {"target": target, "compiler": compiler.version, "content": content_key(source, target, root)}
        self._write(key, source, info, binary, log)
        return binary, log

    def file(self, source: str, target: str, compiler: Compiler | None, root: Path = TEMPLATE_DIR) -> Path | None:
        """The binary on disk, built if need be; without a compiler, what any compiler built of it earlier, or None."""
        if compiler is not None:
            self.get_or_build(source, target, compiler, root)
            return self.folder / cache_key(source, target, compiler, root) / "kernel.bin"
        content = content_key(source, target, root)
        for _, _, entry in reversed(self.entries()):
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((entry / "info.json").read_text()).get("content") == content
                if found and self._read(entry.name) is not None:
                    return entry / "kernel.bin"
        return None

    def _read(self, key: str) -> tuple[bytes, str] | None:
        entry = self.folder / key
        try:
            binary = (entry / "kernel.bin").read_bytes()
            info = json.loads((entry / "info.json").read_text())
        except (OSError, ValueError):
            return None
        if info.get("sha256") != hashlib.sha256(binary).hexdigest():
            shutil.rmtree(entry, ignore_errors=True)  # damaged on disk: build it again
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)  # for the eviction order
        return binary, str(info.get("log", ""))

    def _write(self, key: str, source: str, facts: dict[str, str], binary: bytes, log: str) -> None:
        temporary = self.folder / f".tmp-{os.getpid()}-{uuid.uuid4().hex}"
        info = {
            "sha256": hashlib.sha256(binary).hexdigest(),
            **facts,
            "log": log,
        }
        try:
            temporary.mkdir(parents=True)
            (temporary / "kernel.cu").write_text(source)
            (temporary / "kernel.bin").write_bytes(binary)
            (temporary / "info.json").write_text(json.dumps(info, indent=1))
            try:
                temporary.rename(self.folder / key)
            except OSError:  # another process was first, or a damaged entry is in the way
                if self._read(key) is None:
                    shutil.rmtree(self.folder / key, ignore_errors=True)
                    temporary.rename(self.folder / key)
        except OSError as error:
            if not self.folder.is_dir() or not os.access(self.folder, os.W_OK):
                raise CacheError(
                    f"The kernel cache {self.folder} cannot be written ({error}). Set TSLD_CACHE_DIR to another folder."
                ) from error
            if self._read(key) is None:
                raise CacheError(
                    f"Writing the kernel cache {self.folder} failed: {error}. Free disk space or set TSLD_CACHE_DIR."
                ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.trim()

    def entries(self) -> list[tuple[float, int, Path]]:
        """(last use in seconds since the epoch, bytes, folder) of every entry, oldest first."""
        found = []
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):  # removed by another process meanwhile
                if not entry.name.startswith(".tmp-"):
                    found.append((entry.stat().st_mtime, sum(f.stat().st_size for f in entry.iterdir()), entry))
        return sorted(found)

    def trim(self) -> None:
        """Remove what killed processes left behind, then the least recently used entries above the limit."""
        for leftover in self.folder.glob(".tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(leftover, ignore_errors=True)
        entries = self.entries()
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries[:-1]:  # the newest stays, whatever its size
            if total <= self.limit_bytes:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= size

    def clear(self) -> None:
        """Remove every entry and leftover."""
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            shutil.rmtree(entry, ignore_errors=True)
