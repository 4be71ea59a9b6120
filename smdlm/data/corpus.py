"""The built-in corpus: the Python standard library that runs this program, as source code, as its docstrings, or as
their prose alone."""

import ast
import gc
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from smdlm.data.readers import key_bytes

PARTS = ("docstrings", "prose", "source")
# Tests; packages of others; and files that a program wrote: character maps, the help topics of pydoc and the record
# of how this interpreter was built, which is different on every machine.
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
LEFT_OUT_FOLDERS |= {"encodings", "pydoc_data"}
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")


def files() -> list[tuple[str, Path]]:
    """(path relative to the standard library with '/', file), sorted by the relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    kept = [
        (relative.as_posix(), path)
        for relative, path in found
        if not LEFT_OUT_FOLDERS.intersection(relative.parts[:-1])
        and not any(part.startswith(LEFT_OUT_PREFIXES) for part in relative.parts)
    ]
    return sorted(kept)


def documents(part: str) -> list[tuple[str, str]]:
    """(relative path, text) of each file: the whole 'source', its 'docstrings' joined by blank lines, or their 'prose'.

    Files that are not UTF-8 and files without a docstring (for those parts) are left out. Takes 1 to 3 seconds.
    """
    texts = ((name, document_text(path, part)) for name, path in files())
    return [(name, text) for name, text in texts if text]


def document_text(path: Path, part: str) -> str:
    """Text of one file, '' when it is not UTF-8 or has no docstring."""
    try:
        source = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""
    if part == "source":
        return source
    docstrings = _docstrings(source)
    return "\n\n".join(docstrings) if part == "docstrings" else "\n".join(_prose(docstrings))


def _docstrings(source: str) -> list[str]:
    """Docstrings of module, classes and functions, in the order of the file, without their indentation."""
    tree = _parsed(source)
    found = (ast.get_docstring(node, clean=False) for node in _owners(tree))
    return [text for text in (inspect.cleandoc(raw) for raw in found if raw) if text]


def _parsed(source: str) -> ast.Module:
    """Without the collector of cycles, which a tree has none of: it would look at all of its nodes again and again, and
    at what jax made before, which took a third of the time of reading the corpus."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files have escapes that newer parsers warn of
            return ast.parse(source)
    finally:
        if collects:
            gc.enable()


def _prose(docstrings: list[str]) -> list[str]:
    """Their paragraphs of sentences, a line each. Tables, examples and lists of names, which are made of columns and
    signs, teach a small model to write blanks."""
    paragraphs = (" ".join(text.split()) for doc in docstrings for text in re.split(r"\n\s*\n", doc) if _is_prose(text))
    return [text for text in paragraphs if len(text) >= 40]


def _is_prose(paragraph: str) -> bool:
    """Whether nothing stands in columns and letters and spaces make up nine tenths."""
    columns = any(re.search(r"\S {2,}\S", line.replace(".  ", ". ")) for line in paragraph.splitlines())
    plain = sum(character.isalpha() or character.isspace() for character in paragraph)
    return not columns and ">>>" not in paragraph and plain >= 0.9 * len(paragraph)


def _owners(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below (and with) this one that may have a docstring; only statements are visited, which is fast."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        inside = getattr(node, block, ())
        for statement in inside if isinstance(inside, list) else ():  # the body of a lambda is no list
            yield from _owners(statement)


def share(key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key`: below the validation share means validation."""
    return int.from_bytes(hashlib.sha256(key_bytes(key)).digest()[:7], "big") / 2**56
