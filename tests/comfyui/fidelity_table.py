"""What the tests of fidelity measured, as tables in a document that say it of each version of ComfyUI."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Measured", "write_version"]

_VERSIONS = ["ComfyUI", "torch in ComfyUI", "torch in the ranks", "latents compared", "worst error", "failures"]
_ERRORS = ["test", "case"]
"""And a column a version."""


@dataclass(frozen=True)
class Measured:
    """How far one latent through a daemon is from ComfyUI's own, relatively."""

    test: str
    case: str
    save: str
    ranks: int
    error: float

    @property
    def row(self) -> tuple[str, str]:
        """Samplers have a row a family, everything else has one a case."""
        case = f"{self.save} {self.case.split('-')[0]}" if self.test == "test_every_sampler" else self.case
        return self.test.removeprefix("test_").replace("_", " "), case


def write_version(path: Path, system: Mapping[str, Any], measured: Iterable[Measured], failures: int) -> None:
    """Put what was measured with this version of ComfyUI into a document, in the place of what it said of it before.

    The tables are the document's sections. What stands before them stays, and so does what they say of other versions.
    """
    errors: dict[tuple[str, str], list[float]] = {}
    for each in measured:
        errors.setdefault(each.row, []).append(each.error)
    text = path.read_text() if path.exists() else ""
    versions = {row[0]: row for row in _read(text, "Versions")[1:]}
    (_, _, *columns), *lines = _read(text, "Errors") or [_ERRORS]
    rows = {(test, case): dict(zip(columns, cells, strict=True)) for test, case, *cells in lines}

    version = system["comfyui_version"]
    worst = {row: max(of_row) for row, of_row in errors.items()}
    torches = [system["pytorch_version"], importlib.metadata.version("torch")]
    compared = str(sum(map(len, errors.values())))
    versions[version] = [version, *torches, compared, _number(max(worst.values())), str(failures)]
    for row in rows.keys() | worst.keys():
        rows.setdefault(row, {})[version] = _number(worst[row]) if row in worst else ""

    newest_first = sorted(versions, key=lambda each: [int(part) for part in re.findall(r"\d+", each)], reverse=True)
    shown = [[*row, *(cells.get(each, "") for each in newest_first)] for row, cells in sorted(rows.items())]
    tables = [
        *("## Versions", "", *_table(_VERSIONS, [versions[each] for each in newest_first]), ""),
        *("## Errors", "", *_table([*_ERRORS, *newest_first], [row for row in shown if any(row[2:])]), ""),
    ]
    path.write_text(re.split(r"(?m)^## ", text)[0] + "\n".join(tables))


def _number(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _read(text: str, title: str) -> list[list[str]]:
    """The table below a title, without the rule below its head."""
    below = text.partition(f"## {title}\n\n")[2].splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in itertools.takewhile(bool, below)]
    return rows[:1] + rows[2:]
