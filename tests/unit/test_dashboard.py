"""The Grafana dashboard asks for metrics and labels that tacod exports, and shows all that it exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import ProcessCollector
from prometheus_client.parser import text_string_to_metric_families as parse

from tacod.observe.exporter import Exporter

from .test_exporter import reading, scrape

PATH = Path(__file__).parents[2] / "containers" / "grafana" / "dashboards" / "tacod.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text())
SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""
NAME = re.compile(r"[a-zA-Z_]\w*")
FUNCTIONS = {"changes", "count", "histogram_quantile", "increase", "rate", "sum"}
WORDS = FUNCTIONS | {"by", "group_left", "on"}


class Query(NamedTuple):
    """A query of a panel, and the text by which a series of it is known."""

    where: str
    expr: str
    legend: str


def queries() -> list[Query]:
    """All of them, those of annotations too."""
    found = [
        Query(panel["title"], target["expr"], target["legendFormat"])
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]
    return found + [Query(each["name"], each["expr"], each["textFormat"]) for each in DASHBOARD["annotations"]["list"]]


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of every metric that the exporter has."""
    exporter = Exporter("127.0.0.1:0")
    exporter.publish(reading())
    labels: dict[str, set[str]] = {}
    for family in parse(scrape(exporter)):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    exporter.close()
    return labels


def metrics(expr: str) -> set[str]:
    return {each for each in NAME.findall(re.sub(r'"[^"]*"|\$\w+', "", expr)) if each.startswith("tacod_")}


def labels(query: Query) -> set[str]:
    """The labels that a query names, in its selectors, its groupings and its legend."""
    selected = [
        name for inside in re.findall(r"\{([^}]*)\}", query.expr) for name in re.findall(r"(\w+)\s*[=!]", inside)
    ]
    grouped = [
        name
        for inside in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", query.expr)
        for name in NAME.findall(inside)
    ]
    return {*selected, *grouped, *re.findall(r"\{\{(\w+)\}\}", query.legend)}


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.where}, {query.legend}")
def test_it_names_what_there_is(query: Query, exported: dict[str, set[str]]) -> None:
    named = metrics(query.expr)
    assert named
    assert named <= set(exported)
    assert labels(query) <= SCRAPED.union(*(exported[name] for name in named))
    # A legend can name only what an aggregation leaves.
    shown = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
    outermost = re.match(r"(?:60 \* )?(?:sum|count) (?:by \(([^)]*)\) )?\(", query.expr)
    if outermost is not None or query.expr.startswith("histogram_quantile"):
        assert shown == set(NAME.findall(outermost[1] or "" if outermost else ""))
    words = set(NAME.findall(re.sub(r'"[^"]*"|\$\w+|\[[^]]*\]|\{[^}]*\}', "", query.expr)))
    assert words - named - WORDS <= labels(query)
    # A counter only makes sense as a rate, and a rate only of a counter.
    for name in named:
        counts = re.search(rf"\b(rate|increase|changes)\({name}\{{", query.expr) is not None
        assert counts == name.endswith(("_total", "_bucket", "_sum", "_count")), name


def test_it_shows_all_that_is_exported(exported: dict[str, set[str]]) -> None:
    asked = set().union(*(metrics(query.expr) for query in queries()))
    own = {family.name for family in ProcessCollector(namespace="tacod", registry=None).collect()}
    seen = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    lacking = {
        name
        for name in exported
        if re.sub(r"_(bucket|sum|count)$", "", name) not in seen and re.sub("_total$", "", name) not in own
    }
    assert lacking == set()


def test_daemons_are_chosen_in_every_query() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "instance"}
    for query in queries():
        selectors = re.findall(r"tacod_\w+(\{[^}]*\})?", query.expr)
        assert selectors
        assert set(selectors) == {'{instance=~"$instance"}'}
    for each in (*DASHBOARD["panels"], *DASHBOARD["annotations"]["list"], variables["instance"]):
        assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_grafanas_own_models_know_every_key() -> None:
    """What they don't know is lost on the way through them; they don't check values."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="pip install -e '.[dev]' brings it")
    from grafana_foundation_sdk.cog import encoder, plugins

    plugins.register_default_plugins()
    known = json.loads(json.dumps(models.Dashboard.from_json(DASHBOARD), cls=encoder.JSONEncoder))
    # These are Prometheus' own, which its data source reads.
    assert set(lost(DASHBOARD, known)) == {f"annotations.list.0.{name}" for name in ("titleFormat", "textFormat")}


def lost(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """The places of what is in one document, and not or not so in another."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            yield from lost(value, known[key], f"{path}{key}.") if key in known else [f"{path}{key}"]
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for at, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from lost(one, other, f"{path}{at}.")
    elif given != known:
        yield path.rstrip(".")


def test_panels_say_what_they_show_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["description"].endswith(".")
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
