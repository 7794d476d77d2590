"""What Prometheus reads: names by its rules, few label values, the same numbers as ``stats``, and no way to harm."""

from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

from tacod.config import ConfigError
from tacod.observe.exporter import SCRAPES, STATES, Exporter, GroupReading, Reading
from tacod.observe.metrics import Metrics, StepTimes

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
RANKS = 3
UNITS = ("seconds", "bytes", "ratio")
NOT_BASE_UNITS = re.compile(
    r"_(ms|us|milliseconds|minutes|hours|kib|mib|kilobytes|megabytes|percent|count|sum|bucket)(_|$)"
)


def reading(models: int = 0, clients: int = 2, names: Sequence[str] = ("0",)) -> Reading:
    """What a daemon would publish whose groups have three ranks each."""
    metrics = Metrics()
    metrics.add_step(StepTimes(queue_s=0.25, wire_s=0.5, compute_s=1.0, collective_s=2.0), forwards=2, ranks=RANKS)
    metrics.add_step(StepTimes(0.0, 0.0, 0.01, 0.0), forwards=1, ranks=1, prefix_hits=3, prefix_misses=4)
    metrics.loads.observe(7.0)
    metrics.jobs_total["failed"] += 1
    rank = {
        "device_name": "cpu",
        "memory_used_bytes": 10,
        "prefix_bytes": 3,
        "memory_total_bytes": 40,
        "device_memory_used_bytes": 30,
        "utilization": 0.5,
    }
    status: dict[str, Any] = {
        "state": "ready",
        "version": "1.2.3",
        "uptime_s": 12.5,
        "clients": clients,
    }
    group = {
        "models": [{"id": str(index)} for index in range(models)],
        "queue": {"running": 1, "queued": 4},
        "world_size": RANKS,
        "ranks": [{**rank, "rank": index, "device": f"cpu:{index}"} for index in range(RANKS)],
    }
    stats = {
        "rx_bytes": 1000,
        "tx_bytes": 2000,
        "store": {"bytes": 5, "hits": 6, "misses": 7},
    }
    totals = {**metrics.totals(), "group_restarts": 8}
    groups = [GroupReading.take({**group, "name": name}, totals, metrics) for name in names]
    return Reading(status, stats, groups)


@pytest.fixture(scope="module")
def server() -> Iterator[Exporter]:
    server = Exporter("127.0.0.1:0")
    yield server
    server.close()


@pytest.fixture
def exporter(server: Exporter) -> Exporter:
    server.publish(reading())
    return server


def scrape(exporter: Exporter) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text: str = answer.read().decode()
    return text


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and label values."""
    found = [sample for family in parse(text) for sample in family.samples]
    values = {(sample.name, *sample.labels.values()): sample.value for sample in found}
    assert len(values) == len(found), "a series stands there twice"
    return values


def test_names_follow_the_rules(exporter: Exporter) -> None:
    families: list[Metric] = list(parse(scrape(exporter)))
    assert len(families) > 25
    for family in families:
        assert re.fullmatch(r"tacod_[a-z0-9]+(_[a-z0-9]+)*", family.name), family.name
        assert not NOT_BASE_UNITS.search(family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        # The parser takes the suffix off a counter's name; what is no counter must not have it.
        assert family.name.endswith("_total") is False
        names = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert names == {f"{family.name}_total"}
        elif family.type == "histogram":
            assert family.name.endswith("_seconds")
            assert names == {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
        for unit in UNITS:
            assert unit not in family.name or family.name.endswith((unit, "_info")), f"{family.name}: unit last"


def test_what_is_of_a_group_has_its_name_where_there_are_several(exporter: Exporter) -> None:
    one = samples(scrape(exporter))
    exporter.publish(reading(names=["a", "b"]))
    two = samples(scrape(exporter))
    of_host = {
        "build_info",
        "state",
        "clients",
        "received_bytes",
        "sent_bytes",
        "store_bytes",
        "store_hits",
        "store_misses",
    }
    for (name, *labels), value in one.items():
        if name.removeprefix("tacod_").removesuffix("_total") in of_host or name.startswith("tacod_process_"):
            assert (name, *labels) in two
        else:
            assert (name, *labels) not in two
            # In a bucket's labels the group comes before the bound or behind it.
            for group in "ab":
                assert value in [
                    told for (each, *more), told in two.items() if each == name and set(more) == {*labels, group}
                ]


def test_labels_take_few_values(exporter: Exporter) -> None:
    few = samples(scrape(exporter))
    exporter.publish(reading(models=1000, clients=1000))
    many = samples(scrape(exporter))
    assert set(few) == set(many), "models and clients add no series"
    assert len(many) < 110


def test_values_are_those_of_stats(exporter: Exporter) -> None:
    values = samples(scrape(exporter))
    expected = {
        ("tacod_forwards_total",): 3,
        ("tacod_parallel_forwards_total",): 2,
        ("tacod_retried_forwards_total",): 0,
        ("tacod_prefix_hits_total",): 3,
        ("tacod_prefix_misses_total",): 4,
        ("tacod_jobs_total", "failed"): 1,
        ("tacod_jobs_total", "result"): 0,
        ("tacod_received_bytes_total",): 1000,
        ("tacod_sent_bytes_total",): 2000,
        ("tacod_store_bytes",): 5,
        ("tacod_store_hits_total",): 6,
        ("tacod_store_misses_total",): 7,
        ("tacod_group_restarts_total",): 8,
        ("tacod_step_seconds_count",): 2,
        ("tacod_step_seconds_sum",): 3.76,
        ("tacod_step_seconds_bucket", "0.01"): 1,
        ("tacod_step_seconds_bucket", "2.5"): 1,
        ("tacod_step_seconds_bucket", "5.0"): 2,
        ("tacod_step_seconds_bucket", "+Inf"): 2,
        ("tacod_step_part_seconds_total", "queue"): 0.25,
        ("tacod_step_part_seconds_total", "wire"): 0.5,
        ("tacod_step_part_seconds_total", "compute"): 1.01,
        ("tacod_step_part_seconds_total", "collective"): 2.0,
        ("tacod_load_seconds_sum",): 7,
        ("tacod_queue_jobs", "running"): 1,
        ("tacod_queue_jobs", "queued"): 4,
        ("tacod_clients",): 2,
        ("tacod_models",): 0,
        ("tacod_world_size",): RANKS,
        ("tacod_ranks",): RANKS,
        ("tacod_rank_memory_used_bytes", "cpu:1", "1"): 10,
        ("tacod_rank_prefix_bytes", "cpu:1", "1"): 3,
        ("tacod_device_memory_used_bytes", "cpu:1", "1"): 30,
        ("tacod_device_memory_total_bytes", "cpu:1", "1"): 40,
        ("tacod_rank_utilization_ratio", "cpu:2", "2"): 0.5,
        **{("tacod_state", name): float(name == "ready") for name in STATES},
    }
    assert {key: values[key] for key in expected} == pytest.approx(expected)
    build = next(family for family in parse(scrape(exporter)) if family.name == "tacod_build_info")
    assert build.samples[0].labels["version"] == "1.2.3"
    assert values[("tacod_process_open_fds",)] > 0


def test_what_is_not_known_is_left_out(exporter: Exporter) -> None:
    told = reading()
    told.groups[0].status["ranks"][0]["utilization"] = None
    exporter.publish(told)
    series = [key for key in samples(scrape(exporter)) if key[0] == "tacod_rank_utilization_ratio"]
    assert len(series) == RANKS - 1


def test_silent_scrapers_are_bounded_and_closed(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tacod.observe.exporter._Handler.timeout", 0.5)
    silent = [socket.create_connection(("127.0.0.1", exporter.port), timeout=10) for _ in range(SCRAPES)]
    time.sleep(0.1)
    with socket.create_connection(("127.0.0.1", exporter.port), timeout=10) as late:
        assert late.recv(1) == b"", "one more is closed at once"
    for connection in silent:
        assert connection.recv(1) == b"", "who says nothing is closed"
        connection.close()
    assert "tacod_forwards_total" in scrape(exporter)


def test_rubbish_is_answered_or_closed(exporter: Exporter) -> None:
    for request in (
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /metrics HTTP/1.0\r\n\r\n",
        b"GET " + b"x" * 70000 + b"\r\n",
    ):
        with socket.create_connection(("127.0.0.1", exporter.port), timeout=10) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert "tacod_forwards_total" in scrape(exporter)


def test_a_unix_socket_is_for_its_group_and_goes_at_the_end() -> None:
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        path = Path(folder, "m.sock")
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(path))
        left.close()
        exporter = Exporter(f"unix:{path}")
        exporter.publish(reading())
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        with pytest.raises(ConfigError, match=r"metrics\.listen: .*: Address already in use: process \d+"):
            Exporter(f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            told = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b"200 OK" in told
        assert b"tacod_forwards_total 3.0" in told
        exporter.close()
        assert not path.exists()


def test_what_is_no_socket_stays_and_so_does_what_took_its_place() -> None:
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        path = Path(folder, "m.sock")
        path.write_text("years of work")
        with pytest.raises(ConfigError, match=r"metrics\.listen: .*is no socket but a regular file"):
            Exporter(f"unix:{path}")
        assert path.read_text() == "years of work"
        path.unlink()
        exporter = Exporter(f"unix:{path}")
        path.unlink()
        path.write_text("years of work")
        exporter.close()
        assert path.read_text() == "years of work"


def test_what_was_made_goes_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            Exporter(f"unix:{folder}/m.sock")
        assert list(Path(folder).iterdir()) == []


def test_a_taken_port_is_named(exporter: Exporter) -> None:
    with pytest.raises(ConfigError, match=rf"metrics\.listen: 127\.0\.0\.1:{exporter.port}: Address already in use"):
        Exporter(f"127.0.0.1:{exporter.port}")


def test_the_operators_page_lists_every_metric_and_no_other(exporter: Exporter) -> None:
    exported = {
        f"{family.name}_total" if family.type == "counter" else family.name for family in parse(scrape(exporter))
    }
    listed = set(re.findall(r"^\| `(tacod_\w+)`", OPERATIONS.read_text(), re.MULTILINE))
    assert {name for name in exported if not name.startswith("tacod_process_")} == listed
