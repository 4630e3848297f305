"""From a record of a data file to a conversation: its values checked, and what there is to say about them counted."""

import ast
import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import takewhile
from numbers import Number
from typing import Any

from instruct_lm.data.conversation import Conversation, Turn
from instruct_lm.data.shapes import Layout, Malformed, check_columns, recognise, shown

_ROLES = {role: role for role in ("system", "user", "assistant")} | {"developer": "system"}
_ROLES |= dict.fromkeys(("human", "prompter"), "user")
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")
_TEXT_PARTS = ("text", "input_text", "output_text")
# What public files write where an instruction needs no input, after brackets and punctuation at the edges are stripped.
_EDGES = " \t\n<>[](){}.,:;!-–—*_'\"`"
_PLACEHOLDER = re.compile(
    r"no[ _-]?input( (is )?(needed|required|provided|given))?|no additional input|n/?a|none|nan|null|nil|empty"
    r"|not applicable|无|无输入|なし",
    re.IGNORECASE,
)


class Unusable(ValueError):
    """An entry that cannot be learned from; the message says why."""


class RecordReader:
    """Makes conversations of records, and counts what there is to say about them.

    Attributes:
        counts: (kind, name) → number of entries, where kind is `number`, `null`, `placeholder`, `unused` or `cut`.
        layouts: The keys of records → their layout.
        taken: Shape name → number of entries.
        unrecognised: While there are no layouts: the keys of the first record that has any.

    Args:
        columns: Field → key, for records with other keys than the shapes have.
        clean: Whether a placeholder for "no input" becomes an empty input.

    Raises:
        InputError: `columns` names a field that there is not.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, clean: bool = False) -> None:
        self.columns, self.clean = dict(columns or {}), clean
        check_columns(self.columns)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.layouts: dict[tuple[str, ...], Layout] = {}
        self.taken: Counter[str] = Counter()
        self.unrecognised: tuple[str, ...] = ()
        self._noted: set[tuple[str, str]] = set()  # of the record being read

    def read(self, record: Any, number: int) -> Conversation:
        """Make a conversation of a record.

        Args:
            record: Any value; of an entry, a mapping.
            number: Its number in the file.

        Raises:
            Malformed: It is no entry.
            Unusable: A response or a request is blank, or there is no response or no request.
        """
        if not isinstance(record, Mapping):
            raise Malformed(f"it is {_a(record)}, not an object with keys")
        record = {str(key): value for key, value in record.items()}
        keys = tuple(record)
        if (layout := self.layouts.get(keys)) is None:
            self.unrecognised = self.unrecognised or keys  # of no use once a layout is found
            layout = self.layouts[keys] = recognise(keys, self.columns)
        self.taken[layout.shape.name] += 1
        self._noted = {("unused", key) for key in layout.unused if not _is_blank(record[key])}
        fields = {field: record[key] for field, key in layout.keys.items()}
        read = self._alpaca if "instruction" in fields else self._completion if "prompt" in fields else self._messages
        try:
            return Conversation(self._checked([*self._system(fields.get("system")), *read(fields)]), number)
        finally:
            self.counts.update(self._noted)

    def _system(self, value: Any) -> Iterator[Turn]:
        if not _is_blank(value):
            yield Turn("system", self._text(value, "system"))

    def _messages(self, fields: Mapping[str, Any]) -> Iterator[Turn]:
        for field in ("messages", "conversations"):
            if field in fields:
                yield from self._turns(fields[field], field)

    def _alpaca(self, fields: Mapping[str, Any]) -> Iterator[Turn]:
        yield from self._history(fields.get("history"))
        given = self._text(fields.get("input", ""), "input")
        if _PLACEHOLDER.fullmatch(given.strip(_EDGES)):
            self._noted.add(("placeholder", given.strip()))
            given = "" if self.clean else given
        yield Turn("user", self._text(fields["instruction"], "instruction"), given if given.strip() else "")
        yield Turn("assistant", self._text(fields["output"], "output"))

    def _completion(self, fields: Mapping[str, Any]) -> Iterator[Turn]:
        yield from self._history(fields.get("history"))
        for field, role in (("prompt", "user"), ("completion", "assistant"), ("response", "assistant")):
            if field in fields:
                value = _plain(fields[field])
                if isinstance(value, list):
                    yield from self._turns(value, field)
                else:
                    yield Turn(role, self._text(value, field))

    def _history(self, value: Any) -> Iterator[Turn]:
        """Earlier exchanges: pairs of request and response, or messages."""
        pairs = _items(value, "history")
        if any(isinstance(pair, Mapping) for pair in pairs):
            yield from self._turns(pairs, "history")
            return
        for i, pair in enumerate(map(_plain, pairs), start=1):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise Malformed(f"history {i} is {_a(pair)}, not a pair of request and response")
            yield Turn("user", self._text(pair[0], "history"))
            yield Turn("assistant", self._text(pair[1], "history"))

    def _turns(self, value: Any, field: str) -> Iterator[Turn]:
        for i, item in enumerate(_items(value, field), start=1):
            if not isinstance(item, Mapping):
                raise Malformed(f"{field}, turn {i} is {_a(item)}, not an object with role and content")
            folded = {str(key).strip().casefold(): value for key, value in item.items()}
            yield self._turn(folded, f"{field}, turn {i}", field)

    def _turn(self, item: dict[str, Any], place: str, field: str) -> Turn:
        role, texts = "role", ("content", "value", "text")
        if _is_blank(item.get("role")) and "from" in item:
            role, texts = "from", ("value", "content", "text")
        text = next((key for key in texts if key in item), texts[0])
        if calls := [key for key in ("tool_calls", "function_call") if not _is_blank(item.get(key))]:
            raise Malformed(f"{place}: {calls[0]} cannot be trained on")
        if missing := [key for key in (role, text) if key not in item]:
            raise Malformed(f"{place}: {missing[0]} is missing (its keys: {shown(list(item))})")
        named = _ROLES.get(str(item[role]).strip().casefold())
        if named is None:
            known = ", ".join(_ROLES)
            raise Malformed(f"{place}: the role {item[role]!r:.40} cannot be trained on, only {known}")
        self._noted |= {("unused", f"{field}: {key}") for key in item.keys() - {role, text} if not _is_blank(item[key])}
        content = _plain(item[text])
        parts = content if isinstance(content, list) else [content]
        return Turn(named, "".join(self._part(part, place, field) for part in parts))

    def _part(self, part: Any, place: str, field: str) -> str:
        """The text of a content or of a part of it; parts are joined as they are, as chat templates do."""
        if isinstance(part, Mapping):
            if (kind := part.get("type", "text")) not in _TEXT_PARTS:
                raise Malformed(f"{place}: a part of type {kind!r:.40} cannot be trained on, only text")
            if "text" not in part:
                raise Malformed(f"{place}: a part has no text (its keys: {shown(list(part))})")
            part = part["text"]
        return self._text(part, field, place)

    def _text(self, value: Any, field: str, place: str = "") -> str:
        """A value as text: null and NaN as blank, a number as its text."""
        value = _plain(value)
        if isinstance(value, str):
            return value
        if value is None or _is_nan(value):
            self._noted.add(("null", field))
            return ""
        if isinstance(value, Number):
            self._noted.add(("number", field))
            return str(value).lower() if isinstance(value, bool) else str(value)
        raise Malformed(f"{place or field} is {_a(value)}, not text")

    def _checked(self, turns: list[Turn]) -> tuple[Turn, ...]:
        """Join leading system turns, cut what follows the last response, and refuse blank turns."""
        leading = [turn.text for turn in takewhile(lambda turn: turn.role == "system", turns)]
        rest = turns[len(leading) :]
        if any(turn.role == "system" for turn in rest):
            raise Malformed("a system turn stands behind other turns; it must come first")
        while rest and rest[-1].role != "assistant":
            rest.pop()
            self._noted.add(("cut", "turns"))
        if not rest:
            raise Unusable("there is no response")
        seen: Counter[str] = Counter()
        for turn in rest:
            seen[turn.role] += 1
            if not (turn.text.strip() or turn.input.strip()):
                name = {"user": "request", "assistant": "response"}[turn.role]
                raise Unusable(f"the {name} is blank" if len(rest) == 2 else f"{name} {seen[turn.role]} is blank")
        if "user" not in seen:
            raise Unusable("there is no request")
        system = "\n\n".join(text for text in leading if text.strip())
        return ((Turn("system", system),) if system else ()) + tuple(rest)


def _items(value: Any, field: str) -> list[Any]:
    """The items of a list, which may be written as text in JSON or Python, as CSV files hold it."""
    value = _plain(value)
    if _is_blank(value):
        return []
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                value = parse(value)
                break
    if not isinstance(value, (list, tuple)):
        raise Malformed(f"{field} is {_a(value)}, not a list")
    return list(value)


def _plain(value: Any) -> Any:
    """A value without NumPy, which pandas makes."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_blank(value: Any) -> bool:
    value = _plain(value)
    return value is None or value == [] or _is_nan(value) or (isinstance(value, str) and not value.strip())


def _is_nan(value: Any) -> bool:
    return isinstance(value, Number) and value != value


def _a(value: Any) -> str:
    """The type of a value in a message."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a truth value", type(None): "null"}
    named = next((name for kind, name in names.items() if isinstance(value, kind)), None)
    return named or ("a number" if isinstance(value, Number) else f"of type {type(value).__name__}")
