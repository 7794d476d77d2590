"""docs/protocol.md's table of the video families' arguments is what their models take."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from helpers import GOLDEN, read_golden

from tacod.rank.families.inputs import Argument, Number, Numbers, Record, Spec, Unread

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
GOLDENS = {
    "wan": "wan*",
    "hunyuan_video": "hunyuan_*",
    "kandinsky5": "kandinsky5*",
    "ltxv": "ltxv*",
    "ltxav": "ltx2*",
    "minimax_h3": "minimax_h3*",
}
"""The files of each family's models."""
ELSEWHERE = {"x", "timestep", "context", "control", "rope_options", "qk_norm_eps"}
"""What the page says of all families."""


@cache
def rows(family: str) -> set[tuple[str, str]]:
    """The arguments and forms that the page has for a family."""
    table = TEXT[TEXT.index("| family | argument | form |") :].split("\n\n")[0]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()[2:]]
    return {(name.strip("`"), form) for families, name, form, _ in cells if f"`{family}`" in families}


@cache
def specs(family: str) -> dict[str, list[Spec]]:
    """All that its goldens' models take, by name."""
    found: dict[str, list[Spec]] = defaultdict(list)
    for path in GOLDEN.glob(f"{GOLDENS[family]}.safetensors"):
        model = read_golden(path.stem).model()
        assert type(model).family == family
        for name, spec in model.arguments().items():
            if name not in ELSEWHERE and not isinstance(spec, Unread):
                found[name].append(spec)
    return found


def form(spec: Spec) -> str:
    """A regular expression for how the page writes a spec. A size that the model has is a word in small letters."""
    if isinstance(spec, Number):
        whole = all(isinstance(each, int) for each in (spec.least, spec.most))
        return f"array of {'int' if whole else 'float'}s" if spec.many else "float"
    if isinstance(spec, Record | Numbers):
        return "array of maps" if getattr(spec, "many", False) else "map"
    assert isinstance(spec, Argument)
    if spec.shape is None:
        names = [choice for choice in spec.choices if isinstance(choice, str)]
        return " or ".join(f"`{choice}`" for choice in names) if names else "bool"
    sizes = [re.escape(size) if isinstance(size, str) else f"({size}|[a-z]+)" for size in spec.shape]
    if spec.shared:
        sizes = [size.replace("B", "B or 1") for size in sizes]
    return ("list of " if spec.many else "") + rf"\[{', '.join(sizes)}\]"


@pytest.mark.parametrize("family", GOLDENS)
def test_each_argument_is_in_the_table(family: str) -> None:
    documented = rows(family)
    for name, found in specs(family).items():
        for spec in found:
            assert any(each == name and re.fullmatch(form(spec), text) for each, text in documented), (name, form(spec))


@pytest.mark.parametrize("family", GOLDENS)
def test_each_row_of_the_table_is_an_argument(family: str) -> None:
    for name, text in rows(family):
        assert any(re.fullmatch(form(spec), text) for spec in specs(family)[name]), (name, text)


@pytest.mark.parametrize("family", GOLDENS)
def test_what_is_needed_is_marked(family: str) -> None:
    needed = {name for name, found in specs(family).items() if any(spec.required for spec in found)}
    table = TEXT[TEXT.index("| family | argument | form |") :].split("\n\n")[0]
    marked = {row.split(" | ")[1].strip("`") for row in table.splitlines() if f"`{family}`" in row and "needed" in row}
    assert marked == needed


@pytest.mark.parametrize(("family", "name"), [("ltxav", "guide_attention_entries"), ("minimax_h3", "minimax_payload")])
def test_the_fields_of_maps_are_on_the_page(family: str, name: str) -> None:
    def fields(record: Record) -> set[str]:
        """With those of the maps within it; what only repeats others may be left out."""
        found = {field for field, spec in record.fields.items() if getattr(spec, "required", False)}
        within = [fields(spec) for spec in record.fields.values() if isinstance(spec, Record)]
        return found.union({field for field, spec in record.fields.items() if isinstance(spec, Record)}, *within)

    (record, *_) = specs(family)[name]
    assert isinstance(record, Record)
    missing = {field for field in fields(record) if f"`{field}`" not in TEXT}
    assert missing == set()
