"""diffusers' ``config.json``: whether a family reads its class, and its values with checks.

The families turn it into a configuration of theirs (`DiT.diffusers`). The names of their classes are in
``diffusers_classes.txt`` for the supervisor, which imports no family: ``python -m tacod.tools.families --write``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tacod_client.errors import ModelUnsupported

__all__ = ["CLASSES", "CLASSES_FILE", "DiffusersConfig", "check_class", "is_known_class"]

CLASSES_FILE = Path(__file__).with_name("diffusers_classes.txt")
CLASSES = tuple(CLASSES_FILE.read_text(encoding="utf-8").split())
"""Every family's classes, as `DiffusersConfig.class_name` gives them."""


@dataclass(frozen=True)
class DiffusersConfig:
    """A configuration with checks. All methods raise `ModelUnsupported`, naming the key, for values that can't be."""

    values: Mapping[str, Any]

    @property
    def class_name(self) -> str | None:
        """The class; ``Transformer2DModel``, which several models share, with its norm's type in brackets."""
        name = self.values.get("_class_name")
        if not isinstance(name, str):
            return None
        return f"{name}({self.values.get('norm_type')})" if name == "Transformer2DModel" else name

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it stands there; the family checks it."""
        return self.values.get(key, default)

    def whole(self, key: str, default: int) -> int:
        """A whole number."""
        value = self.values.get(key, default)
        if type(value) is not int or not 0 <= value <= 1 << 20:
            raise ModelUnsupported(f"config.json: {key} is {value!r:.80}; expected a whole number")
        return value

    def only(self, key: str, expected: int) -> int:
        """The one value that this version runs, which is diffusers' default too."""
        value = self.values.get(key, expected)
        if value != expected:
            raise ModelUnsupported(f"config.json: {key} is {value!r:.80}; this version runs {expected} here")
        return expected

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; null means the default."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def several(self, key: str, default: Sequence[float]) -> list[Any]:
        """As many values as there are of ``default``; the family checks each."""
        value = self.values.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != len(default):
            raise ModelUnsupported(f"config.json: {key} is {value!r:.80}; expected {len(default)} numbers")
        return list(value)

    def items(self, key: str, default: Sequence[int]) -> Any:
        """A list; a value that is none as it stands there, for the family to refuse."""
        value = self.values.get(key, default)
        return list(value) if isinstance(value, list | tuple) else value


def is_known_class(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` names a class of a family, or one that has such a name in its own."""
    name = DiffusersConfig(config).class_name or ""
    return any(known in name for known in CLASSES)


def check_class(path: str, config: Mapping[str, Any]) -> None:
    """Raise `ModelUnsupported`, naming the class, if no family reads what is in the folder ``path``."""
    if not is_known_class(config):
        known = ", ".join(name for name in CLASSES if "(" not in name)
        raise ModelUnsupported(
            f"{path}: config.json's _class_name is {config.get('_class_name')!r:.80}; "
            f"this version reads folders of {known}"
        )
