"""What the tests of fidelity measured, as a section of a document."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Measured", "write_section"]

_SAMPLERS = "test_every_sampler"
_RANKS = (1, 2, 3)


@dataclass(frozen=True)
class Measured:
    """How far one latent through a daemon is from ComfyUI's own, relatively."""

    test: str
    case: str
    save: str
    ranks: int
    error: float


def write_section(path: Path, system: Mapping[str, Any], measured: Iterable[Measured]) -> None:
    """Put the results of this version of ComfyUI into a document, in the place of older ones."""
    measured = list(measured)
    title = f"## ComfyUI {system['comfyui_version']}\n"
    versions = (
        f"torch {system['pytorch_version']} in ComfyUI, {importlib.metadata.version('torch')} in the ranks, on CPUs."
    )
    worst = max(each.error for each in measured)
    lines = [title, f"{versions} {len(measured)} latents were compared; the worst error is {worst:.1e}.\n"]
    lines += ["### Samplers\n", *_samplers([each for each in measured if each.test == _SAMPLERS])]
    lines += ["### Everything else\n", *_others([each for each in measured if each.test != _SAMPLERS])]
    before, *sections = re.split(r"(?m)^(?=## )", path.read_text() if path.exists() else "")
    sections = [section for section in sections if not section.startswith(title)]
    sections = sorted([*sections, "\n".join(lines)], reverse=True)
    path.write_text("\n".join(part.rstrip("\n") + "\n" for part in (before, *sections)))


def _samplers(measured: list[Measured]) -> list[str]:
    """A row a sampler, a column a family."""
    families = list(dict.fromkeys(each.case.split("-")[0] for each in measured))
    rows: dict[str, dict[str, float]] = {}
    for each in measured:
        row = rows.setdefault(each.save, {})
        family = each.case.split("-")[0]
        row[family] = max(row.get(family, 0.0), each.error)
    cells = [[f"`{name}`", *(_number(row.get(family)) for family in families)] for name, row in rows.items()]
    return _table(["sampler", *families], cells)


def _others(measured: list[Measured]) -> list[str]:
    """A row a case, a column a number of ranks."""
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for each in measured:
        row = rows.setdefault((each.test.removeprefix("test_").replace("_", " "), each.case), {})
        row[each.ranks] = max(row.get(each.ranks, 0.0), each.error)
    cells = [[*name, *(_number(row.get(ranks)) for ranks in _RANKS)] for name, row in rows.items()]
    return _table(["test", "case", "1 rank", "2 ranks", "3 ranks"], cells)


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}" if error else "0"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [*(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]
