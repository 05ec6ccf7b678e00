"""The demo's text: the documentation that every Python installation carries, so nothing is downloaded.

A document is one entry of `pydoc_data.topics` (the language reference that `help()` shows) or all docstrings
of one module of the standard library. The sources are parsed, never imported. What belongs to train,
validation and test follows from a document's name alone, so that a document falls into the same split on
every Python version, although its text differs a little from one to the next.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]

MINIMUM_CHARACTERS = 200_000
"""With less text than this, perplexities mean nothing."""

SHARED_CHARACTERS = 80
"""A paragraph of at least this many characters occurs in one document only; shorter ones ("Return self.") may
recur, as in any prose."""

SPLIT_SALT = "2154:"
"""Hashed in front of a document's name. Chosen for the sizes alone: each held-out split holds about 5 % of
the characters too, and no document makes up more than a fifth of its split (Python 3.10 to 3.13)."""

SKIPPED_FOLDERS = frozenset({
    "test", "tests", "idle_test",  # tests, not documentation
    "_bundled", "_vendor",  # other projects' code
    "encodings",  # a hundred generated tables under one and the same sentence
    "pydoc_data",  # its topics are documents of their own
    "__pycache__",
})  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One document: `name` is "topic:<topic>" or "module:<dotted name>"."""

    name: str
    text: str


def load_splits() -> dict[str, list[Document]]:
    """The documents by split ("train", "validation", "test"), each list in order of name."""
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for document in load_documents():
        splits[split_of(document.name)].append(document)
    return splits


def load_documents() -> list[Document]:
    """All documents of this Python installation in order of name, without repeated paragraphs."""
    return list(_load_documents())


def split_of(name: str) -> Split:
    """The split of the document with this name: about 90 % train, 5 % validation, 5 % test."""
    share = int.from_bytes(hashlib.sha256((SPLIT_SALT + name).encode()).digest()[:8], "big") / 2**64
    if share < 0.90:
        return "train"
    return "validation" if share < 0.95 else "test"


@functools.cache
def _load_documents() -> tuple[Document, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    documents = _without_repeats([*_topics(), *_modules(library)])
    characters = sum(len(document.text) for document in documents)
    if characters < MINIMUM_CHARACTERS:
        from tsld_fx.errors import TsldError

        raise TsldError(
            f"demo text: pydoc_data.topics and docstrings under {library} hold {characters:,} characters,"
            f" and {MINIMUM_CHARACTERS:,} are needed. This Python came without the sources of its standard "
            "library: install the full package, or give a text of your own."
        )
    return tuple(documents)


def _without_repeats(documents: Iterable[Document]) -> list[Document]:
    """Keeps one copy of each long paragraph: a test document's before a validation document's before a train
    document's. So held-out documents stay whole, and what they say is never in train word for word."""
    seen: set[str] = set()
    kept: list[Document] = []
    rank = ("test", "validation", "train")
    for document in sorted(documents, key=lambda d: (rank.index(split_of(d.name)), d.name)):
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= SHARED_CHARACTERS:
                if key in seen:
                    continue
                seen.add(key)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs).strip("\n") + "\n"
        if len(text) >= SHARED_CHARACTERS:
            kept.append(Document(document.name, text))
    return sorted(kept, key=lambda document: document.name)


def _topics() -> Iterator[Document]:
    """The language reference's topics; none where a distribution has stripped them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in topics.items():
        yield Document(f"topic:{name}", text.strip("\n"))


def _modules(library: Path) -> Iterator[Document]:
    """One document for each module under `library` that has docstrings."""
    for folder, subfolders, files in os.walk(library):
        # site-packages, lib-dynload and the like are no identifiers
        subfolders[:] = sorted(s for s in subfolders if s.isidentifier() and s not in SKIPPED_FOLDERS)
        for path in sorted(Path(folder) / name for name in files if name.endswith(".py")):
            parts = path.relative_to(library).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            docstrings = [f"{owner}\n{text}" for owner, text in _docstrings(path, name)]
            if docstrings:
                yield Document(f"module:{name}", "\n\n".join(docstrings))


def _docstrings(path: Path, module: str) -> list[tuple[str, str]]:
    """(qualified name, docstring) of the module, its classes and functions, in the order of the source."""
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree has no cycles, and looking for them doubles the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    finally:
        if collecting:
            gc.enable()
    return list(_docstrings_below(tree, module))


def _docstrings_below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=False)
        if text is not None and (text := inspect.cleandoc(text)):
            yield name, text
    for child in (*body, *getattr(node, "orelse", ()), *getattr(node, "handlers", ())):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings_below(child, f"{name}.{child.name}")
        else:
            yield from _docstrings_below(child, name)
