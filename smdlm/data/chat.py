"""Chats as token ids: a tokenizer's own Jinja template, run in a sandbox, since it comes with a download.

A special token that the template spells becomes its id. One that a message spells ('<|im_end|>') is text, as it is in
every text of the package: a user can not end his own turn.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from jinja2 import sandbox

from smdlm.data.vocabulary import Tokenizer, checked_text
from smdlm.files import one_line

Messages = Sequence[Mapping[str, Any]]  # {"role": "system" | "user" | "assistant" | .., "content": text}
MARK = "\ufdd0"  # no character, as U+FFFF is none; a template moves it with the text around it


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer with the Jinja source of its template; ValueError, one line, if it has none or it does not parse."""

    tokenizer: Tokenizer
    source: str

    def __post_init__(self):
        if not self.source:
            raise ValueError(
                f"chat template: got none with the tokenizer {self.tokenizer.name!r}, wanted chat_template in its "
                "tokenizer_config.json, or a file chat_template.jinja beside it"
            )
        _ = self.compiled

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The one that was found beside the tokenizer's files."""
        return cls(tokenizer, tokenizer.chat_template)

    @functools.cached_property
    def compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: got {one_line(error)}, wanted a Jinja template: mend it") from error

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """{name: id} of the special tokens."""
        backend = self.tokenizer.backend
        if backend is None:
            return {}
        flagged = [token.content for token in backend.tokenizer.get_added_tokens_decoder().values() if token.special]
        names = {name for name in (*flagged, *backend.special, backend.eos, backend.bos, backend.mask) if name}
        ids = {name: backend.tokenizer.token_to_id(name) for name in names}
        return {
            name: i for name, i in ids.items() if i is not None and len(name) > 1
        }  # of one character none can be marked

    @functools.cached_property
    def names(self) -> re.Pattern:
        """Matches the longest special token at a position; a template without any is one piece of text."""
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def render(template: ChatTemplate, messages: Messages, *, answer: bool = False, prefix: str = "") -> np.ndarray:
    """The chat as ids, i32 [n].

    Args:
      messages: the turns, first to last.
      answer: opens the turn of the assistant at the end, for a model to go on with.
      prefix: with `answer`, how that turn begins.

    Raises:
      ValueError: one line; no message, one without a role or a text, a template that fails or reaches for more than
        its messages.
    """
    if prefix and not answer:
        raise ValueError(f"chat: got the prefix {prefix[:40]!r} without an answer to begin, wanted answer=True")
    text = _rendered(template, _checked(messages, template), answer) + _as_text(template, prefix)
    ids, end = [], 0
    for match in template.names.finditer(text):
        ids += [_encoded(template, text[end : match.start()]), [template.special[match[0]]]]
        end = match.end()
    ids.append(_encoded(template, text[end:]))
    return np.concatenate(ids).astype(np.int32)


def end_of_turn(template: ChatTemplate) -> list[int]:
    """Ids that end the assistant's turn: the special token that the template puts behind its text, [] for none."""
    try:
        ids = render(template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "z"}]).tolist()
    except ValueError:  # a template that wants other turns: it is heard of when a chat is rendered
        return []
    last = _encoded(template, "z")[-1]
    behind = ids[len(ids) - ids[::-1].index(last) :] if last in ids else []
    return [i for i in behind if i in template.special.values()][:1]


def _rendered(template: ChatTemplate, messages: Messages, answer: bool) -> str:
    backend = template.tokenizer.backend
    roles = {"bos_token": backend.bos, "eos_token": backend.eos} if backend else {}
    try:
        return template.compiled.render(messages=messages, add_generation_prompt=answer, **roles)
    # A template is a program of others: it may do anything that raises, and none of it is a fault of ours.
    except Exception as error:
        raise ValueError(
            f"chat template: got {one_line(error)}, wanted a template that renders these messages"
        ) from error


def _encoded(template: ChatTemplate, text: str) -> np.ndarray:
    text = text.replace(MARK, "")
    return template.tokenizer.encode(text) if text else np.zeros(0, np.int32)


def _checked(messages: Messages, template: ChatTemplate) -> list[dict[str, Any]]:
    """The messages with their texts marked as text; all other fields of a message are the template's business."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"chat: got {messages!r}, wanted a list of messages {{'role': .., 'content': ..}}, at least 1")
    checked = []
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise ValueError(f"chat: got {message!r} as message {number}, wanted 'role' and 'content', both texts")
        checked.append({**fields, **{name: _as_text(template, fields[name]) for name in ("role", "content")}})
    return checked


def _as_text(template: ChatTemplate, text: str) -> str:
    """The text with a mark inside every name of a special token, so that none is found there."""
    return template.names.sub(lambda match: match[0][0] + MARK + match[0][1:], checked_text(text).replace(MARK, ""))


# ------------------------------------------------------------------------------------------------------------- sandbox


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Refuses what Jinja's sandbox would silently render as nothing, and products that fill the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise sandbox.SecurityError(f"{attribute!r} of a {type(obj).__name__}, which a template may not see")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(x, (int, float)) and abs(x) < 1e6 for x in (left, right)):
            raise sandbox.SecurityError(f"the operator {operator!r} on anything but small numbers")
        return super().call_binop(context, operator, left, right)


@functools.cache
def _environment() -> jinja2.Environment:
    """With the names and filters that the templates of released models use."""
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return made


def _to_json(value: Any, indent: int | None = None) -> str:
    """Without the escapes that Jinja's own puts into it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
