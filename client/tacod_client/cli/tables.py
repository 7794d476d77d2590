"""What ``tacoctl`` shows is laid out by these: as wide as a terminal, with nothing cut."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tacod_client.text import printable

__all__ = ["LEAST_WIDTH", "Columns", "Facts", "Wrapped", "glyph", "text"]

LEAST_WIDTH = 24
"""Least width of a terminal: an id has 16 letters. A narrower one breaks lines itself."""
_LAST = 32
"""Least width of a last column that may take several lines."""
_GAP = "  "


def text(value: Any) -> Text:
    """A value as one line of text; what a terminal would obey, or its locale doesn't have, is replaced."""
    if isinstance(value, Text):
        return value
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return Text(printable(str(value)).encode(encoding, "backslashreplace").decode(encoding))


def glyph(drawn: str, plain: str) -> str:
    """A sign to draw with, or a substitute if stdout's encoding doesn't have it."""
    try:
        drawn.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        return plain
    return drawn


class Wrapped:
    """A text that is broken at its commas first, so that numbers keep their units."""

    def __init__(self, shown: Any) -> None:
        self.text = text(shown)

    def lines(self, console: Console, width: int) -> list[Text]:
        """The text in lines of at most this width."""
        if self.text.cell_len <= width:
            return [self.text]
        lines: list[Text] = []
        for part in self.text.split(", ", include_separator=True):
            if lines and lines[-1].cell_len + part.cell_len <= width + part.plain.endswith(" "):
                lines[-1].append_text(part)
            elif part.cell_len <= width + part.plain.endswith(" "):
                lines.append(part)
            else:
                lines += part.wrap(console, width, overflow="fold", no_wrap=False)
        for line in lines:
            line.rstrip()
        return lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(console, options.max_width)


class Facts:
    """Names and values, one a line; if a value doesn't fit beside its name, it goes below."""

    def __init__(self, facts: Iterable[tuple[str, Any]]) -> None:
        self.facts = [(name, Wrapped(value)) for name, value in facts]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        indent = max((len(name) for name, _ in self.facts), default=0) + len(_GAP)
        below = width - indent < LEAST_WIDTH and any(indent + value.text.cell_len > width for _, value in self.facts)
        if below:
            indent = len(_GAP)
        for name, value in self.facts:
            head = Text(name, "bold")
            lines = value.lines(console, max(width - indent, 1))
            if below:
                yield head
            for line in lines:
                start = Text(" " * indent) if below or line is not lines[0] else head + Text(" " * (indent - len(name)))
                yield start + line


class Columns:
    """Rows under heads. No id, name or number is ever cut.

    If a row is too long, columns without a head (graphics only) are left out. If it is still too long, the ``long``
    columns go below their row, each on a line of its own. If that is still too long, every value has its own line.
    """

    def __init__(self, heads: Sequence[str], rows: Iterable[Sequence[Any]], long: Sequence[str] = ()) -> None:
        self.heads = list(heads)
        self.rows = [[text(cell) for cell in row] for row in rows]
        self.long = [index for index, head in enumerate(heads) if head in long]
        self._widths = [max((row[index].cell_len for row in self.rows), default=0) for index in range(len(self.heads))]
        self._widths = [max(width, len(head)) for width, head in zip(self._widths, self.heads, strict=True)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        columns = list(range(len(self.heads)))
        named = [index for index in columns if self.heads[index]]
        short = [index for index in named if index not in self.long]
        for shown in (columns, named, short):
            *others, last = shown
            least = min(self._widths[last], _LAST) if last in self.long else self._widths[last]
            room = width - sum(self._widths[index] + len(_GAP) for index in others)
            if least <= room:
                yield self._row([Text(self.heads[index], "bold") for index in shown], shown)
                for row in self.rows:
                    yield from self._side_by_side(console, row, shown, room)
                    for index in named if shown is short else ():
                        if index in self.long and row[index]:
                            for line in Wrapped(row[index]).lines(console, width - len(_GAP)):
                                yield Text(_GAP) + line
                return
        for number, row in enumerate(self.rows):
            if number:
                yield Text()
            yield Facts((self.heads[index], row[index]) for index in named)

    def _side_by_side(self, console: Console, row: list[Text], shown: list[int], room: int) -> Iterator[Text]:
        """The row, of which the last column may take several lines."""
        *others, last = shown
        first, *rest = Wrapped(row[last]).lines(console, room)
        yield self._row([*(row[index] for index in others), first], shown)
        for line in rest:
            yield self._row([*(Text() for _ in others), line], shown)

    def _row(self, cells: Sequence[Text], shown: Sequence[int]) -> Text:
        line = Text()
        for index, cell in zip(shown, cells, strict=True):
            line.append_text(cell)
            line.append(" " * (self._widths[index] - cell.cell_len) + _GAP)
        line.rstrip()
        return line
