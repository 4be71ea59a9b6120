"""For the site alone: the last section of troubleshooting.md, all messages of the package, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "smdlm"
PLACE = "<!-- all messages -->"


def messages() -> dict[str, list[str]]:
    """{module: texts that it raises, '…' where a value stands}, without the lists below some of them."""
    found: dict[str, list[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        texts = dict.fromkeys(_raised(ast.parse(file.read_text("utf-8"))))
        if texts:
            found[file.relative_to(SOURCE).as_posix()] = list(texts)
    return found


def _raised(tree: ast.AST) -> Iterator[str]:
    raised = {id(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            text = _spelled(node.args[0]).partition("\n")[0]
            told = ("got " in text and "wanted" in text) or (id(node) in raised and ("got " in text or ": " in text))
            if told and text.strip("…: "):
                yield text


def _spelled(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_spelled(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _spelled(node.left) + _spelled(node.right)
    return "…"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for every page."""
    if PLACE not in markdown:
        return markdown
    lines = []
    for module, texts in messages().items():
        lines += [f"### `smdlm/{module}`", "", *(f"- `{text}`" for text in texts), ""]
    return markdown.replace(PLACE, "\n".join(lines))
