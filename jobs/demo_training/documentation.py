"""The documentation on this machine: docstrings of the standard library and of installed packages.

Sources are parsed, not imported; only a few modules written in C are imported for their docstrings.
A source (a top-level module or package) is trained on as a whole or held out as a whole.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import xxhash

C_MODULES = ("builtins", "itertools", "math", "time", "zlib")
"""Modules without Python source whose docstrings people ask about."""
SKIPPED = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo"}
SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`*'\"(])|\n\s*\n")
MIN_SHARED_CHARACTERS = 40
"""A sentence of this length that stands in two documents makes one of them a copy."""
HELD_OUT_ONE_IN = 4
"""One in so many sources of the standard library is held out for tests."""
PART_CHARACTERS = 600
"""A part of a package's description ends with the paragraph that goes beyond this length."""


@dataclass(frozen=True, slots=True)
class Document:
    """A docstring, or a part of a package's description.

    Attributes:
        name: Qualified name.
        text: Text of the docstring without its indentation.
    """

    name: str
    text: str

    @property
    def source(self) -> str:
        """Top-level module or package."""
        return self.name.partition(".")[0]

    @property
    def sentences(self) -> list[str]:
        """The text in sentences and paragraphs, with single spaces."""
        return [" ".join(part.split()) for part in SENTENCE.split(self.text) if part.strip()]


def standard_library() -> Iterator[Document]:
    """Yield each module, class and function docstring of this Python, sorted by file name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in C_MODULES:
        yield from _of_c_module(name)
    yield from _of_sources(library, sorted(library.rglob("*.py")))


def installed_packages() -> Iterator[Document]:
    """Yield docstrings and descriptions of all packages in this environment, sorted by name."""
    found = {d.metadata["Name"].lower(): d for d in metadata.distributions()}
    for _, package in sorted(found.items()):
        files = [Path(str(package.locate_file(f))) for f in package.files or ()]
        yield from _description(package)
        yield from _of_sources(
            Path(str(package.locate_file(""))),
            sorted(f for f in files if f.suffix == ".py" and f.is_file()),
        )


def held_out(source: str) -> bool:
    """Say whether a source is never trained on. Its name alone decides, on every machine alike."""
    return xxhash.xxh3_64_intdigest(source.encode()) % HELD_OUT_ONE_IN == 0


def without_copies(documents: Iterable[Document], of: Iterable[Document]) -> list[Document]:
    """Drop documents that share a long sentence with those in `of`, and repeated texts.

    Packages carry copies of standard library modules. Training on them would leak what is held out.
    """
    known = {s for document in of for s in document.sentences if len(s) >= MIN_SHARED_CHARACTERS}
    kept: dict[str, Document] = {}
    for document in documents:
        if known.isdisjoint(document.sentences):
            kept.setdefault(document.text, document)
    return list(kept.values())


def _of_sources(root: Path, files: Iterable[Path]) -> Iterator[Document]:
    for file in files:
        if not file.is_relative_to(root):
            continue
        parts = file.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue  # templates and deliberately broken files
        seen: set[str] = set()
        for name, doc in _docstrings(tree, ".".join(p for p in parts if p != "__init__")):
            if name and doc and name not in seen:
                seen.add(name)
                yield Document(name, doc)


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    yield name, (ast.get_docstring(node) or "").strip()
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _of_c_module(module: str) -> Iterator[Document]:
    for name, value in sorted(vars(importlib.import_module(module)).items()):
        if name.startswith("_") or inspect.ismodule(value) or not callable(value):
            continue
        members = sorted(vars(value).items()) if inspect.isclass(value) else []
        for path, item in [(name, value), *((f"{name}.{m}", v) for m, v in members)]:
            doc = getattr(item, "__doc__", None)
            if isinstance(doc, str) and doc.strip() and "._" not in path:
                yield Document(f"{module}.{path}", inspect.cleandoc(doc))


def _description(package: metadata.Distribution) -> Iterator[Document]:
    """Yield a package's long description in parts."""
    paragraphs = re.split(r"\n\s*\n", str(package.metadata.json.get("description", "")))
    name = package.metadata["Name"].replace("-", "_")
    part: list[str] = []
    number = 0
    for paragraph in [*paragraphs, ""]:
        if part and (not paragraph or sum(map(len, part)) > PART_CHARACTERS):
            number += 1
            yield Document(f"{name}.readme{number}", "\n\n".join(part))
            part = []
        if len(re.findall(r"[a-z]{3,}", paragraph)) >= 5 and "http" not in paragraph:
            part.append(paragraph.strip())
