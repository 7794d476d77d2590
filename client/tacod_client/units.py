"""Numbers with their units, as text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["duration", "ms", "short", "size"]


def ms(seconds: float) -> str:
    """Milliseconds, as text."""
    return f"{seconds * 1000:.1f} ms"


def size(count: float) -> str:
    """Bytes, as text in binary units."""
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB"))


def short(count: float) -> str:
    """A count, as text: 12.0 B for 12 billion."""
    return _scaled(count, 1000, ("", " k", " M", " B"))


def _scaled(count: float, step: int, units: Sequence[str]) -> str:
    """A number in the largest unit that gives at least 1, as it is shown; in the first unit as a whole number."""
    for unit in units:
        shown = f"{count:.0f}" if unit == units[0] else f"{count:.1f}"
        if float(shown) < step or unit == units[-1]:
            return shown + unit
        count /= step
    raise AssertionError


def duration(seconds: float) -> str:
    """The two largest units that matter."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{value} {unit}" for value, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if value]
    return " ".join([*parts[:2], *([f"{seconds} s"] if not days and not hours else [])])
