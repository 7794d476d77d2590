"""The README's table of model families, written from the families' own attributes.

``python -m tacod.tools.families`` prints it. ``--write`` puts it between the markers in README.md and README.zh.md, in
this folder, and the names of diffusers' classes into tacod's package (`tacod.checkpoint.diffusers`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tacod.checkpoint.diffusers import CLASSES_FILE
from tacod.rank.families import families

__all__ = ["LANGUAGES", "classes", "insert", "main", "table"]

LANGUAGES = {
    "README.md": ("family", "models", "in `tacoctl`", "diffusers class"),
    "README.zh.md": ("系列", "模型", "`tacoctl` 中的名称", "diffusers 类"),
}
"""Each file's headings."""
_START = "<!-- families: written by `python -m tacod.tools.families --write` -->\n"
_END = "<!-- /families -->\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table or write it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tacod.tools.families", description=__doc__)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    if not args.write:
        sys.stdout.write(table("README.md"))
        return 0
    for name in LANGUAGES:
        path = Path(name)
        path.write_text(insert(path.read_text(encoding="utf-8"), table(name)), encoding="utf-8")
    CLASSES_FILE.write_text(classes(), encoding="utf-8")
    return 0


def classes() -> str:
    """The names of diffusers' classes, a line each."""
    return "".join(f"{name}\n" for family in families() for name in family.diffusers)


def table(name: str) -> str:
    """The Markdown table for the README of this name, a line for each family."""
    headings = LANGUAGES[name]
    rows = [headings, ("---",) * len(headings)]
    for family in families():
        # A class with its norm in brackets is an older name of one of the others.
        classes = [f"`{each}`" for each in family.diffusers if "(" not in each]
        rows.append((family.title, ", ".join(family.models), f"`{family.family}`", ", ".join(classes) or "–"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def insert(text: str, new: str) -> str:
    """A README's text with this table between its markers.

    Raises `ValueError` if a marker is missing.
    """
    start, end = text.index(_START) + len(_START), text.index(_END)
    return f"{text[:start]}\n{new}\n{text[end:]}"


if __name__ == "__main__":
    sys.exit(main())
