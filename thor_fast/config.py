"""Frozen dataclasses <-> TOML: a section is a dataclass, a key is a field, nothing is dropped.

A field is an ``int``, ``float``, ``bool`` or ``str``, a ``Literal`` of strings, one of these
``| None`` (absent in the file), or another dataclass (a sub-section). An ``int`` will do for a
``float``; nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from thor_fast.errors import ConfigError

__all__ = ["dump_toml", "from_mapping", "load_toml"]

T = TypeVar("T")


def load_toml(path: Path, schema: type[T]) -> T:
    """Read a file into ``schema``. ``ConfigError`` names file, section, key, got and expected."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        return from_mapping(data, schema)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_mapping(data: Mapping[str, Any], schema: type[T], section: str = "") -> T:
    """Build ``schema`` from nested mappings; ``section`` is its name in messages."""
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, schema)) if f.init}
    where = f"[{section}] " if section else ""
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3) or sorted(fields)
            raise ConfigError(f"{where}unknown key {key!r}, expected one of: {', '.join(near)}")
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name in data:
            path = f"{section}.{name}" if section else name
            values[name] = _value(data[name], hints[name], path)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}key {name!r} is missing, expected {_name(hints[name])}")
    try:
        return schema(**values)
    except ValueError as error:  # a value out of range
        raise ConfigError(f"{where}{error}") from error


def dump_toml(config: Any) -> str:
    """The text that :func:`load_toml` reads back as an equal ``config``; ``None`` is left out."""
    return "\n".join(_lines(config, "")).lstrip("\n") + "\n"


def _value(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_mapping(value, typing.cast(type, option), path)
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:  # exactly: True is not an int here
            return value
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return value
    raise ConfigError(f"{path} is {value!r} ({type(value).__name__}), expected {_name(hint)}")


def _is_union(hint: Any) -> bool:
    # ``Literal[...] | None`` is one of typing's own kind.
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "a section"
    if _is_union(hint):
        return " or ".join(_name(o) for o in typing.get_args(hint) if o is not types.NoneType)
    return str(getattr(hint, "__name__", hint))


def _lines(config: Any, section: str) -> list[str]:
    keys: list[str] = []
    sections: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            path = f"{section}.{f.name}" if section else f.name
            sections += ["", f"[{path}]", *_lines(value, path)]
        elif isinstance(value, str):
            # A JSON string is a TOML one, but for DEL, which TOML wants escaped.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            keys.append(f"{f.name} = {text}")
        elif isinstance(value, (bool, int, float)):
            keys.append(f"{f.name} = {str(value).lower()}")
        elif value is not None:
            raise ConfigError(
                f"{f.name} is a {type(value).__name__}, expected int, float, bool, str, None or a "
                "dataclass"
            )
    return keys + sections
