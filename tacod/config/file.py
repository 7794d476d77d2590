"""The configuration as TOML."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tacod.config.config import Config
from tacod.config.section import ConfigError
from tacod_client.small_file import read_small

__all__ = ["load_config", "to_toml"]

MOST_BYTES = 1 << 20


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a configuration file.

    Raises `ConfigError` with a line for each fault.
    """
    try:
        values: dict[str, Any] = tomllib.loads(read_small(path, MOST_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; pass --config FILE") from None
    except ValueError as error:
        # Of a number that Python won't read, its message has advice that is for programmers.
        raise ConfigError(f"{path}: not TOML: {str(error).partition('; use sys.')[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: its arrays or tables are nested too deep; no key needs that") from None
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(path, fault, values) for fault in error.errors())) from None


def _line(path: str | os.PathLike[str], fault: Any, values: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in _key(fault["loc"], values) if part not in ("int", "str", "constrained-int"))
    reason = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        reason = "unknown key; `tacod --print-config` shows the known ones"
    elif fault["type"] == "missing" and key.startswith("curve."):
        reason = "required: TCP is for clients with CURVE keys on an allow-list; `tacoctl keygen` makes keys"
    # What two sections don't agree on names its key itself.
    return f"{path}:{key}: {reason}" if key else f"{path}:{reason}"


def _key(loc: Sequence[int | str], values: dict[str, Any]) -> Sequence[int | str]:
    """The place of a fault as the file has it: a single group's without a number, one of several by its name."""
    if len(loc) < 2 or loc[0] != "group":
        return loc
    groups, at = values["group"], loc[1]
    if not isinstance(groups, list):
        return ["group", *loc[2:]]
    assert isinstance(at, int)
    name = groups[at].get("name") if isinstance(groups[at], dict) else None
    return ["group", name if isinstance(name, str) and name.isprintable() else at, *loc[2:]]


def to_toml(config: Config) -> str:
    """The configuration with all its defaults, as TOML that `load_config` reads; keys without a value are comments."""
    values = config.model_dump()
    groups = values.pop("groups")
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [_line_of_toml(key, value) for key, value in values.items() if key not in tables]
    for group in groups:
        del group["ranks" if config.device == "cuda" and config.launcher == "local" else "gpus"]
    head = "[group]" if len(groups) == 1 else "[[group]]"
    for name, table in (
        *((head, group) for group in groups),
        *((f"[{name}]", table) for name, table in tables.items()),
    ):
        lines += ["", name, *(_line_of_toml(key, value) for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _line_of_toml(key: str, value: Any) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but TOML wants one for DEL as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
