"""The daemon's numbers for Prometheus, over HTTP, on loopback or a unix socket.

The daemon's loop publishes a reading once a second. The threads that answer HTTP see that reading and nothing else
of the daemon, so a slow or hostile scraper costs the loop nothing.
"""

from __future__ import annotations

import platform
import socket
import socketserver
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Histogram, Metric, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from tacod.config import ConfigError
from tacod.observe.metrics import Metrics
from tacod.serving.unix_socket import PathTaken, UnixSocket

__all__ = ["STATES", "Exporter", "GroupReading", "Reading", "families"]

STATES = ("starting", "ready", "degraded", "draining")
EVERY_S = 1.0
"""How old a reading may get."""
SCRAPES = 8
"""Connections answered at once; more are closed, so that they can't use up the daemon's file descriptors."""
PATIENCE_S = 5.0
"""How long a scraper may be silent."""


@dataclass(frozen=True)
class GroupReading:
    """What one moment's `status` and `stats` say of a group, and the two histograms behind them."""

    status: Mapping[str, Any]
    totals: Mapping[str, Any]
    part_seconds: Mapping[str, float]
    steps: Metric
    loads: Metric

    @classmethod
    def take(cls, status: Mapping[str, Any], totals: Mapping[str, Any], metrics: Metrics) -> GroupReading:
        """Copy what still changes."""
        return cls(status, totals, dict(metrics.part_seconds), _copy(metrics.steps), _copy(metrics.loads))


@dataclass(frozen=True)
class Reading:
    """What one moment's `status` says, the totals of `stats`, and the same of each group."""

    status: Mapping[str, Any]
    totals: Mapping[str, Any]
    groups: Sequence[GroupReading]


def _copy(histogram: Histogram) -> Metric:
    """A histogram as it is now, without the time at which it was made: that is the daemon's start."""
    (family,) = histogram.collect()
    family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    return family


def families(reading: Reading) -> Iterator[Metric]:
    """Everything that is exported, in base units; labels take only values of which there are few.

    What is of a group has its name as the label ``group``, if there are several groups.
    """
    status, stats = reading.status, reading.totals
    store = stats["store"]

    build = {"version": status["version"], "python": platform.python_version()}
    yield InfoMetricFamily("tacod_build", "The daemon's version, and Python's.", build)
    state = GaugeMetricFamily(
        "tacod_state", "1 for the state that the daemon is in, 0 for the others.", labels=["state"]
    )
    for name in STATES:
        state.add_metric([name], float(status["state"] == name))
    yield state
    yield _gauge("clients", "Connected clients.", status["clients"])
    yield _counter("received_bytes", "Bytes from clients.", stats["rx_bytes"])
    yield _counter("sent_bytes", "Bytes to clients.", stats["tx_bytes"])
    yield _gauge("store_bytes", "Client tensors kept in host memory.", store["bytes"])
    yield _counter("store_hits", "Tensors named by digest that the store had.", store["hits"])
    yield _counter("store_misses", "Tensors named by digest that it lacked.", store["misses"])
    yield from _of_groups(reading.groups)


def _of_groups(groups: Sequence[GroupReading]) -> Iterator[Metric]:
    """What each group has of its own."""
    own = ["group"] if len(groups) > 1 else []
    names = [[each.status["name"]] if own else [] for each in groups]
    statuses, totals = [each.status for each in groups], [each.totals for each in groups]

    def gauge(name: str, text: str, values: Iterable[float]) -> Metric:
        return _filled(GaugeMetricFamily(f"tacod_{name}", text, labels=own), zip(names, values, strict=True))

    def counter(name: str, text: str, values: Iterable[float]) -> Metric:
        return _filled(CounterMetricFamily(f"tacod_{name}", text, labels=own), zip(names, values, strict=True))

    yield gauge(
        "models",
        "Loaded models, patched ones and their bases each counted.",
        (len(each["models"]) for each in statuses),
    )
    jobs = GaugeMetricFamily("tacod_queue_jobs", "Jobs that run or wait now.", labels=["state", *own])
    yield _filled(
        jobs,
        (
            ([key, *name], each["queue"][key])
            for name, each in zip(names, statuses, strict=True)
            for key in ("running", "queued")
        ),
    )

    for name, text in (
        ("forwards", "Forwards done."),
        ("parallel_forwards", "Forwards done on several ranks."),
        ("skipped_forwards", "Forwards that a step cache mostly skipped."),
    ):
        yield counter(name, text, (each[f"{name}_total"] for each in totals))
    for key, text in (
        ("hits", "Forwards that found their prefix computed."),
        ("misses", "Forwards for which a prefix was computed."),
    ):
        yield counter(f"prefix_{key}", text, (each["prefix"][key] for each in totals))
    retried = (each["retried_forwards"] for each in totals)
    yield counter("retried_forwards", "Steps begun again because the ranks were lost.", retried)
    ended = CounterMetricFamily("tacod_jobs", "Jobs ended, by outcome.", labels=["outcome", *own])
    yield _filled(
        ended,
        (
            ([outcome, *name], count)
            for name, each in zip(names, totals, strict=True)
            for outcome, count in sorted(each["jobs_total"].items())
        ),
    )
    yield _joined(names, [each.steps for each in groups])
    parts = CounterMetricFamily("tacod_step_part_seconds", "Seconds of all steps, by part.", labels=["part", *own])
    yield _filled(
        parts,
        (
            ([part.removesuffix("_s"), *name], seconds)
            for name, each in zip(names, groups, strict=True)
            for part, seconds in each.part_seconds.items()
        ),
    )
    yield _joined(names, [each.loads for each in groups])

    restarts = (each["group_restarts"] for each in totals)
    yield counter("group_restarts", "Times that all ranks were replaced.", restarts)
    yield gauge("world_size", "Ranks that there are to be.", (each["world_size"] for each in statuses))
    yield gauge("ranks", "Rank processes that live now.", (len(each["ranks"]) for each in statuses))
    for key, name, text in (
        (
            "memory_used_bytes",
            "rank_memory_used_bytes",
            "Device memory of a rank's tensors; on a CPU, its resident memory.",
        ),
        ("prefix_bytes", "rank_prefix_bytes", "What a rank keeps of conditioning, so that it is computed once a run."),
        ("device_memory_used_bytes", "device_memory_used_bytes", "Memory of a rank's device in use, by whomever."),
        ("memory_total_bytes", "device_memory_total_bytes", "Memory of a rank's device."),
        ("utilization", "rank_utilization_ratio", "How busy the device is; on a CPU, the rank's share of all cores."),
    ):
        family = GaugeMetricFamily(f"tacod_{name}", text, labels=["rank", "device", *own])
        yield _filled(
            family,
            (
                ([str(rank["rank"]), rank["device"], *of_group], rank[key])
                for of_group, each in zip(names, statuses, strict=True)
                for rank in each["ranks"]
                if rank[key] is not None
            ),
        )


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Iterable[tuple[list[str], float]]) -> Metric:
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def _joined(names: Sequence[list[str]], histograms: Sequence[Metric]) -> Metric:
    """One histogram with the samples of all, under the names of their groups."""
    first = histograms[0]
    joined = Metric(first.name, first.documentation, first.type)
    joined.samples = [
        sample._replace(labels={**sample.labels, **dict(zip(["group"], name, strict=False))})
        for name, histogram in zip(names, histograms, strict=True)
        for sample in histogram.samples
    ]
    return joined


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"tacod_{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"tacod_{name}", text, value)


class Exporter(Collector):
    """An HTTP server on a thread of its own, and the reading that it shows.

    Raises `ConfigError` if nothing can listen there.
    """

    def __init__(self, listen: str) -> None:
        self._reading: Reading | None = None
        self._next_s = 0.0
        registry = CollectorRegistry()
        registry.register(self)
        registry.register(ProcessCollector(namespace="tacod", registry=None))
        try:
            self._server = _server(listen)
        except PathTaken as error:
            raise ConfigError(f"metrics.listen: {error}") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"metrics.listen: {listen}: {reason}; choose another, or end what uses it") from None
        self._server.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._server.server_close()
            raise

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        return int(self._server.server_address[1])

    def due(self, now: float) -> bool:
        """Whether the reading is old; ``now`` is on the monotonic clock."""
        if now < self._next_s:
            return False
        self._next_s = now + EVERY_S
        return True

    def publish(self, reading: Reading) -> None:
        """Show this from now on."""
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        """The families of the last reading, for the registry."""
        if self._reading is not None:
            yield from families(self._reading)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_S

    def handle(self) -> None:
        # A scraper that goes away or falls silent is no event.
        with suppress(ConnectionError, TimeoutError):
            super().handle()

    def log_message(self, *args: Any) -> None:
        pass

    def address_string(self) -> str:
        return "scraper"


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: Any) -> None:
        self._free = threading.BoundedSemaphore(SCRAPES)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The base class asks a name server for this host's name, which can take long.
        socketserver.TCPServer.server_bind(self)
        self._set_up()

    def _set_up(self) -> None:
        self.server_name, self.server_port = "tacod", 0
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def __init__(self, path: str) -> None:
        self._unix = UnixSocket(Path(path))
        super().__init__(path)

    def server_bind(self) -> None:
        self.socket.close()
        self.socket = self._unix.socket
        self._set_up()

    def server_close(self) -> None:
        self._unix.remove()
        super().server_close()

    def get_request(self) -> tuple[Any, Any]:
        request, _ = super().get_request()
        return request, ("", 0)


def _server(listen: str) -> _Server:
    path = listen.removeprefix("unix:")
    if path != listen:
        return _UnixServer(path)
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    return (_Server6 if ":" in host else _Server)((host, int(port)))
