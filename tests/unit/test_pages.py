"""What the pages point at is there, and each fault's test is on the page of promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tacod.lifecycle import FIXED
from tacod.serving import places
from tacod.serving.memory_socket import memory_path

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_the_settings_that_need_a_restart_are_told() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    told = re.findall(r"`([^`]+)`", text[text.index("need a restart are refused by name: ") :].partition(";")[0])
    assert told == [f"[{key[:-1]}]" if key.endswith(".") else key for key in FIXED]
    for name, words in (("README.md", "need a restart"), ("README.zh.md", "须重启才生效")):
        (line,) = re.findall(rf"`group\.cuda_graphs = false`.*\n.*{words}.*", (ROOT / name).read_text(encoding="utf-8"))
        assert all(key in line for key in FIXED if key.startswith(("group.cuda", "group.p", "group.warm")))


def test_the_paths_that_tacod_uses_are_told() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    told = text[text.index("tacod uses the socket's path") :].partition("\n\n")[0]
    socket = Path("/s")
    beside = [places._lock_of(socket), places._folder_of(socket), memory_path(socket)]
    assert re.findall(r"`(\.\w+)`", told) == [path.suffix for path in beside if path is not None]


def test_each_fault_is_on_the_page_with_its_test() -> None:
    told = set(re.findall(r"tests/faults/(test_\w+)\.py", (ROOT / "docs" / "operations.md").read_text()))
    assert told == {path.stem for path in (ROOT / "tests" / "faults").glob("test_*.py")}
