"""Reads settings of frozen dataclasses from text: `depth=3,sampling.temperature=0.7`."""

import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

# A value in double quotes is a JSON string: it may hold commas, and newlines as \n. In brackets: a list of those.
_STRING = r"\"(?:[^\"\\]|\\.)*\""
_SETTING = re.compile(rf"\s*([A-Za-z_][\w.]*)\s*=\s*({_STRING}|\[(?:{_STRING}|[\s,])*\]|[^,\"]*)\s*(?:,|$)")
_ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", re.MULTILINE)
_TEXTS = tuple[str, ...]


def parse(
    cls: type[T], text: str, what: str, defaults: Mapping[str, Callable[[], str]] | None = None, **fixed: Any
) -> T:
    """Makes an instance of a dataclass from `name=value,name=value`; empty text gives the defaults.

    Values are read by the types of the fields: numbers, strings (quoted where they hold commas or line breaks), true or
    false, none, lists of strings (`["a", "b"]`). A field that is a dataclass itself has its settings behind a dot,
    `sampling.temperature=0.7`.

    Args:
        what: names the whole in messages, for instance "budget".
        defaults: give the text of settings that `text` leaves out.
        fixed: fields that have no setting, and their values.

    Raises:
        ValueError: the text is malformed, names a setting that does not exist (those that do are listed), or has a
            value that its type or the dataclass refuses.
        TypeError: of the dataclass's own checks.
    """
    pairs = dict(_pairs(text, what))
    pairs |= {name: default() for name, default in (defaults or {}).items() if name not in pairs}
    return _build(cls, pairs, what, fixed)


def _pairs(text: str, what: str) -> Iterator[tuple[str, str]]:
    begin, names = 0, set()
    while begin < len(text):
        match = _SETTING.match(text, begin)
        if match is None:
            raise ValueError(f"{what}: expected name=value, separated by commas, got {text[begin:]!r}")
        if match[1] in names:
            raise ValueError(f"{what}: {match[1]} is set twice")
        names.add(match[1])
        yield match[1], match[2].strip()
        begin = match.end()


def _build(cls: type[T], pairs: Mapping[str, str], what: str, fixed: Mapping[str, Any]) -> T:
    types_of = settings_of(cls)
    values, nested = dict(fixed), dict[str, dict[str, str]]()
    for name, text in pairs.items():
        first, dot, rest = name.partition(".")
        if first not in types_of or first in fixed or (dot and _inner(types_of[first]) is None):
            settings = ", ".join(sorted(types_of.keys() - fixed.keys()))
            raise ValueError(f"{what}: has no setting {name!r}; it has {settings}")
        if dot:
            nested.setdefault(first, {})[rest] = text
        else:
            values[first] = _value(types_of[first], text, f"{what}: {name}")
    for first, inner in nested.items():
        if first in values:
            raise ValueError(f"{what}: {first} is set as a whole and in parts")
        kind = _inner(types_of[first])
        assert kind is not None
        values[first] = _build(kind, inner, f"{what}: {first}", {})
    missing = [
        field.name
        for field in _fields(cls)
        if field.init and field.default is MISSING and field.default_factory is MISSING and field.name not in values
    ]
    if missing:
        raise ValueError(f"{what}: expected {' and '.join(f'{name}=...' for name in missing)}, which has no default")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def settings_of(cls: type) -> dict[str, Any]:
    """Returns the types of a dataclass's fields by name, in their order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in _fields(cls) if field.init}


def _fields(cls: type) -> tuple[Field, ...]:
    assert is_dataclass(cls)
    return fields(cls)


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _inner(kind: Any) -> type | None:
    """Returns the dataclass that a field may hold; None = it holds none."""
    return next((member for member in _members(kind) if is_dataclass(member) and isinstance(member, type)), None)


def _value(kind: Any, text: str, what: str) -> Any:
    members, quoted = _members(kind), text.startswith('"')
    if _TEXTS in members and text.startswith("["):
        try:
            return tuple(json.loads(text))
        except ValueError:
            raise ValueError(f"{what}: {text} is not a JSON list of strings") from None
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if quoted or text in choices:
        try:
            value = json.loads(text) if quoted else text
        except ValueError:
            raise ValueError(f"{what}: {text} is not a JSON string") from None
        if str in members or value in choices:
            return value
    elif type(None) in members and text.lower() == "none":
        return None
    for member, read in _READERS.items():
        if member in members and not quoted:
            try:
                return read(text)
            except ValueError:
                continue
    raise ValueError(f"{what}: expected {shown_type(kind)}, got {text!r}")


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


# A field that takes several of these types gets the first that fits, the narrowest.
_READERS: dict[type, Callable[[str], Any]] = {bool: _bool, int: int, float: float, str: str}
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an int",
    float: "a number",
    str: "a string",
    type(None): "none",
    _TEXTS: '["...", ...]',
}


def shown_type(kind: Any) -> str:
    """Returns the type of a setting in words."""
    words = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            words += [str(choice) for choice in get_args(member)]
        elif member in _NAMES:
            words.append(_NAMES[member])
        elif isinstance(member, type) and is_dataclass(member):
            words.append(", ".join(f".{name}" for name in settings_of(member)))
    return " or ".join(words)


def describe(cls: type) -> Iterator[str]:
    """Iterates over lines on a dataclass: its summary, and its settings with their defaults and meanings."""
    meanings = {}
    for base in reversed(cls.__mro__):  # a class inherits the meanings that it does not give itself
        for names, text in _ARGUMENT.findall(inspect.cleandoc(base.__doc__ or "").partition("Args:")[2]):
            meanings.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    yield "  " + " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    types_of = settings_of(cls)
    for field in _fields(cls):
        if field.name in types_of:
            if (kind := _inner(types_of[field.name])) is not None:
                default = f"    {field.name}.{{{','.join(settings_of(kind))}}}"
            elif field.default is not MISSING:
                default = f"    {field.name}={_written(field.default)}"
            else:
                default = f"    {field.name}=({shown_type(types_of[field.name])})"
            yield f"{default}  {meanings.get(field.name, '')}".rstrip()


def _written(value: Any) -> str:
    """Returns a default as text that `parse` reads."""
    if isinstance(value, tuple):
        return json.dumps(value)
    if isinstance(value, str):
        return json.dumps(value) if not value or set(value) & set(',"\n') else value
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
