"""Metrics of a daemon that works: the same numbers as ``stats``, at the address that the configuration names."""

from __future__ import annotations

import socket
from pathlib import Path

from helpers import SD3, Daemon, eventually
from prometheus_client.parser import text_string_to_metric_families as parse


def scrape(path: Path) -> dict[tuple[str, ...], float]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        told = b"".join(iter(lambda: connection.recv(65536), b""))
    text = told.decode().partition("\r\n\r\n")[2]
    return {(one.name, *one.labels.values()): one.value for family in parse(text) for one in family.samples}


def test_what_is_exported_is_what_stats_tell(models: Path) -> None:
    daemon = Daemon(1, [models])
    path = daemon.folder / "metrics.sock"
    with daemon.config.open("a") as file:
        file.write(f'metrics.listen = "unix:{path}"\n')
    with daemon, daemon.client() as client:
        SD3.sample(client.load(SD3.file), 6).result()
        told = client.stats()
        values = eventually(
            lambda: (values := scrape(path)).get(("tacod_forwards_total",)) == 6 and values, 10, "a new reading"
        )
        assert told["forwards_total"] == 6
        assert values[("tacod_jobs_total", "result")] == told["jobs_total"]["result"] == 2
        assert values[("tacod_step_seconds_count",)] == told["step_s"]["count"] == 6
        assert values[("tacod_load_seconds_count",)] == 1
        assert values[("tacod_state", "ready")] == 1
        assert values[("tacod_rank_memory_used_bytes", "cpu:0", "0")] > 0
        parts = [values[("tacod_step_part_seconds_total", name)] for name in ("queue", "wire", "compute", "collective")]
        assert abs(sum(parts) - values[("tacod_step_seconds_sum",)]) < 1e-9
