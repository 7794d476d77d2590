"""ComfyUI's own workflows, those of its templates' package and its blueprints, each as one flat graph."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from comfyui_server import PATH, PYTHON

__all__ = ["Input", "Node", "Template", "templates"]

_PACKAGE = "comfyui_workflow_templates_json"
_FROM_INSTANCE, _TO_INSTANCE = -10, -20
"""The ends of links that come into a subgraph, and that leave it."""
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
_AFTER_SEEDS = ("fixed", "increment", "decrement", "randomize")
_BYPASSED = 4
"""The mode of such a node."""
_ON_THE_PAGE_ONLY = ("MarkdownNote", "Note", "Reroute", "PrimitiveNode")


@dataclass(frozen=True)
class Input:
    """A link to a node's output."""

    node: str
    slot: int
    type: str
    """What goes over it, ``MODEL`` or ``*``, as the workflow says."""


@dataclass
class Node:
    """A node with its links, and the values of its widgets in the page's order."""

    kind: str
    links: dict[str, Input] = field(default_factory=dict)
    widgets: Any = ()
    bypassed: bool = False
    """Whether the workflow has it switched off, so that it hands on what it is given."""

    def values(self, takes: Mapping[str, Any]) -> dict[str, Any]:
        """The widgets' values by name; ``takes`` is what ComfyUI says that the node takes (``input`` of its info)."""
        if isinstance(self.widgets, Mapping):
            return dict(self.widgets)
        values = list(self.widgets)
        named = {}
        for name, (kind, *rest) in {**takes.get("required", {}), **takes.get("optional", {})}.items():
            options = rest[0] if rest else {}
            has_widget = isinstance(kind, list) or set(kind.split(",")) <= _WIDGETS
            if not values or options.get("forceInput") or not has_widget:
                continue
            named[name] = values.pop(0)
            if kind == "INT" and values and values[0] in _AFTER_SEEDS:
                values.pop(0)
        return named


@dataclass(frozen=True)
class Template:
    """A workflow's nodes, also those within its subgraphs, by ids of their own. Bypassed nodes are switched on."""

    name: str
    nodes: Mapping[str, Node]


@cache
def templates() -> tuple[Template, ...]:
    """All that this ComfyUI has."""
    code = f"import importlib.util; print(importlib.util.find_spec({_PACKAGE!r}).submodule_search_locations[0])"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    folders = [Path(PATH, "blueprints"), *([Path(found.stdout.strip(), "templates")] if not found.returncode else [])]
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    return tuple(
        Template(path.name, dict(_Scope(json.loads(path.read_text())).flat()))
        for path in paths
        if not path.name.startswith("index")
    )


class _Scope:
    """A graph, or a subgraph where it is used."""

    def __init__(self, graph: Mapping[str, Any], outer: _Scope | None = None, instance: Any = None) -> None:
        self.graph, self.outer, self.instance = graph, outer, instance
        self.prefix = f"{outer.prefix}{instance['id']}/" if outer else ""
        self.kinds: Mapping[str, Any] = (
            outer.kinds if outer else {each["id"]: each for each in _within(graph, "definitions", "subgraphs")}
        )
        self.nodes = {node["id"]: node for node in graph.get("nodes", [])}
        self.links = {link[0]: link for link in map(_as_list, graph.get("links") or [])}
        self.inner = {
            node["id"]: _Scope(self.kinds[node["type"]], self, node)
            for node in self.nodes.values()
            if node["type"] in self.kinds
        }

    def flat(self) -> Iterator[tuple[str, Node]]:
        """All nodes that ComfyUI runs."""
        for node in self.nodes.values():
            if node["id"] in self.inner:
                yield from self.inner[node["id"]].flat()
            elif node["type"] not in _ON_THE_PAGE_ONLY:
                given = ((each["name"], self.source(each.get("link"))) for each in node.get("inputs") or [])
                links = {name: source for name, source in given if source is not None}
                widgets, bypassed = node.get("widgets_values") or (), node.get("mode") == _BYPASSED
                yield f"{self.prefix}{node['id']}", Node(node["type"], links, widgets, bypassed)

    def source(self, link: int | None) -> Input | None:
        """Where a link begins; None where nothing is connected, and a widget has the value."""
        if link is None or link not in self.links:
            return None
        _, origin, slot, _, _, kind = self.links[link]
        if origin == _FROM_INSTANCE:
            assert self.outer is not None
            name = self.graph["inputs"][slot]["name"]
            given = {each["name"]: each.get("link") for each in self.instance.get("inputs") or []}
            return _typed(self.outer.source(given.get(name)), kind)
        node = self.nodes.get(origin)
        if node is None or node["type"] == "PrimitiveNode":
            return None
        if origin in self.inner:
            inner = self.inner[origin]
            ends = [each for each in inner.links.values() if each[3] == _TO_INSTANCE and each[4] == slot]
            return _typed(inner.source(ends[0][0]), kind) if ends else None
        if node["type"] == "Reroute":
            return _typed(self.source(node["inputs"][0].get("link")), kind)
        return Input(f"{self.prefix}{origin}", slot, str(kind))


def _typed(source: Input | None, kind: str) -> Input | None:
    """With the type that the link's other part has, where this part has none."""
    return Input(source.node, source.slot, kind) if source is not None and source.type == "*" else source


def _as_list(link: Any) -> list[Any]:
    if isinstance(link, Mapping):
        return [link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]
    return list(link)


def _within(graph: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        graph = graph.get(key) or {}
    return graph or []
