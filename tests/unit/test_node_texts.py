"""The nodes' translations and help pages cover what the nodes have, no more and no less."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

NODES = Path(__file__).parents[2] / "comfy_nodes"
LANGUAGES = ("en", "zh")
KSAMPLER = {
    *("model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image", "denoise"),
}
"""What ComfyUI's own KSampler takes; ours takes the same."""


def literal(tree: ast.Module, name: str) -> Any:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[union-attr]
    raise AssertionError(f"nodes.py has no {name}")


TREE = ast.parse((NODES / "nodes.py").read_text())
SHARED = {*literal(TREE, "SETTINGS"), *literal(TREE, "ENDPOINT")}
INPUTS = {
    "TACODiTModelLoader": {"model", *SHARED},
    "TACODiTUNETLoader": {"unet_name", *SHARED},
    "TACODiTKSampler": {*KSAMPLER, "enable_taco_dit"},
    "TACODiTInfoDisplay": {"info"},
    "TACODiTStatsDisplay": {"stats"},
}


def test_every_node_has_a_display_name() -> None:
    assert set(literal(TREE, "NODE_DISPLAY_NAME_MAPPINGS")) == set(INPUTS)


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_cover_the_nodes(language: str) -> None:
    told = json.loads((NODES / "locales" / language / "nodeDefs.json").read_text())
    assert {name: set(node["inputs"]) for name, node in told.items()} == INPUTS
    for node in told.values():
        assert node["display_name"]
        assert node["description"]
        for each in (*node["inputs"].values(), *node.get("outputs", {}).values()):
            assert each["name"]
            assert each["tooltip"]
    assert json.loads((NODES / "locales" / language / "main.json").read_text())["nodeCategories"] == {
        "TACO-DiT": "TACO-DiT"
    }


def test_english_says_what_the_nodes_say() -> None:
    told = json.loads((NODES / "locales" / "en" / "nodeDefs.json").read_text())
    names = literal(TREE, "NODE_DISPLAY_NAME_MAPPINGS")
    assert {name: node["display_name"] for name, node in told.items()} == names
    for name, (_, options) in {**literal(TREE, "SETTINGS"), **literal(TREE, "ENDPOINT")}.items():
        assert told["TACODiTModelLoader"]["inputs"][name]["tooltip"] == options["tooltip"]
    described = {
        node.name: ast.literal_eval(each.value)
        for node in TREE.body
        if isinstance(node, ast.ClassDef)
        for each in node.body
        if isinstance(each, ast.Assign) and getattr(each.targets[0], "id", "") == "DESCRIPTION"
    }
    assert {name: node["description"] for name, node in told.items()} == described


@pytest.mark.parametrize("name", INPUTS)
def test_help_pages(name: str) -> None:
    pages = NODES / "web" / "docs"
    for page in (pages / f"{name}.md", pages / name / "zh.md"):
        assert page.read_text().startswith("# TACO-DiT ")


def test_one_version() -> None:
    from tacod_client import __version__

    assert f'version = "{__version__}"' in (NODES / "pyproject.toml").read_text()


INFO: dict[str, Any] = {
    "enabled": True,
    "name": "flux",
    "family": "flux",
    "parameters": 12e9,
    "dtype": "bf16",
    "quantization": {},
    "plan": "sequence 3",
    "note": "",
    "remarks": [],
    "patches": 0,
    "weights": "read by the daemon",
    "world_size": 3,
    "devices": ["cuda:0"],
    "version": "1",
    "state": "ready",
    "endpoint": "ipc:///s",
    "placement": "replicated",
    "resident_bytes": [12 << 30] * 3,
    "streamed_bytes": [0] * 3,
}


def test_info_says_which_group() -> None:
    text = runpy.run_path(str(NODES / "text.py"))["info_text"]
    assert "Ranks: 3 (cuda:0)" in text(INFO).splitlines()
    assert "Ranks: 3 (cuda:0)" in text({**INFO, "group": ""}).splitlines()
    assert "Ranks: 3 (cuda:0) of group large" in text({**INFO, "group": "large"}).splitlines()


@pytest.mark.parametrize(("kind", "where"), [("sharded", "with the other ranks"), ("host", "in the host's memory")])
def test_info_says_what_is_fetched(kind: str, where: str) -> None:
    text = runpy.run_path(str(NODES / "text.py"))["info_text"]
    assert "Memory" not in text(INFO)
    apart = text({**INFO, "placement": kind, "resident_bytes": [8 << 30] * 3, "streamed_bytes": [3 << 30] * 3})
    line = f"Memory: 8.0 GiB of the weights on each rank; 3.0 GiB lie {where} and are fetched in each forward"
    assert line in apart.splitlines()
    apart = text({**INFO, "placement": kind, "resident_bytes": [8 << 30, 11 << 30], "streamed_bytes": [3 << 30, 0]})
    line = (
        f"Memory: 8.0 GiB, 11.0 GiB of the weights on ranks 0 to 1; what they lack lies {where}, and they fetch "
        "3.0 GiB, 0.0 GiB in each forward"
    )
    assert line in apart.splitlines()
