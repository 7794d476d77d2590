"""The READMEs hold the table that the families write, and a line for each benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tacod.checkpoint.diffusers import CLASSES
from tacod.rank.comfyui.tables import TABLES
from tacod.tools import families

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", families.LANGUAGES)
def test_the_table_of_families_is_what_they_say(name: str) -> None:
    """If this fails: ``python -m tacod.tools.families --write``."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert families.insert(text, families.table(name)) == text


def test_the_supervisor_knows_the_families_classes() -> None:
    """If this fails: ``python -m tacod.tools.families --write``."""
    assert "".join(f"{name}\n" for name in CLASSES) == families.classes()


def test_the_table_has_a_line_for_each_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [family.family for family in families.families()]
    assert [line.split(" | ")[2].strip("`") for line in lines[2:]] == names


def test_writing_twice_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in families.LANGUAGES:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert families.main(["--write"]) == 0
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in families.LANGUAGES)


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="substring"):
        families.insert("# TACO-DiT\n", families.table("README.md"))


@pytest.mark.parametrize(("name", "words"), [("README.md", r"\[(\d+) of them\]"), ("README.zh.md", r"\[(\d+) 种\]")])
def test_the_number_of_networks_whose_tokens_are_shared_out(name: str, words: str) -> None:
    found = re.findall(words + re.escape("(docs/comfyui-networks.md)"), (ROOT / name).read_text(encoding="utf-8"))
    assert found == [str(len(TABLES))]


def test_troubles_are_the_same_ones_in_both_languages() -> None:
    """By what stands in each row as code; words can't be compared."""
    rows = []
    for name, begin, end, in_words in (
        ("README.md", "| `TACO-DiT not available: …`", "## More", "`file:key: reason`"),
        ("README.zh.md", "| `TACO-DiT not available: …`", "## 更多", "`文件:键: 原因`"),
    ):
        text = (ROOT / name).read_text(encoding="utf-8").replace(in_words, "")
        lines = text[text.index(begin) : text.index(end)].splitlines()
        rows.append([sorted(re.findall(r"`[^`]+`", line)) for line in lines if line.startswith("| ")])
    english, chinese = rows
    assert len(english) > 20
    assert chinese == english


def test_every_benchmark_has_one_line() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert text.count(f"\n| `{path.name}` |") == 1, path.name
