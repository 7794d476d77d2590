"""A real Prometheus scrapes a real tacod, and has an answer to every query of the Grafana dashboard."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import SD3, Daemon, eventually

PROMETHEUS = shutil.which("prometheus")
PATH = Path(__file__).parents[2] / "containers" / "grafana" / "dashboards" / "tacod.json"
SOON_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class Prometheus:
    """One of the test's own, on loopback, that scrapes an address once a second."""

    def __init__(self, folder: Path, target: str) -> None:
        assert PROMETHEUS is not None
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "tacod", "static_configs": [{"targets": [target]}]}],
        }
        # JSON is YAML.
        (folder / "prometheus.yml").write_text(json.dumps(config))
        self.address = f"127.0.0.1:{free_port()}"
        command = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address={self.address}"], stdout=log, stderr=log, cwd=folder
            )

    def query(self, expr: str) -> list[Any]:
        """The series that a query comes to; an HTTP error for one that is none."""
        asked = urllib.parse.urlencode({"query": expr})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{asked}", timeout=30) as reply:
            told = json.load(reply)
        assert told["status"] == "success"
        found: list[Any] = told["data"]["result"]
        return found

    def answers(self, expr: str) -> list[Any]:
        """The same, and nothing while it starts."""
        assert self.process.poll() is None
        with suppress(ConnectionError, urllib.error.URLError):
            return self.query(expr)
        return []


@pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus: apt-get install prometheus")
def test_prometheus_answers_every_query_of_the_dashboard(models: Path, tmp_path: Path) -> None:
    dashboard = json.loads(PATH.read_text())
    daemon = Daemon(2, [models], settings={"metrics.listen": f"127.0.0.1:{(port := free_port())}"})
    with daemon, daemon.client() as client:
        prometheus = Prometheus(tmp_path, f"127.0.0.1:{port}")
        try:
            model = client.load(SD3.file)
            SD3.sample(model, 4).result()
            # Rates need two scrapes.
            eventually(lambda: prometheus.answers("rate(tacod_forwards_total[15s])"), SOON_S, "two scrapes", 0.2)
            for panel in dashboard["panels"]:
                for target in panel["targets"]:
                    series = prometheus.query(written_out(target["expr"]))
                    assert series, f"{panel['title']}: {target['expr']}"
            for each in dashboard["annotations"]["list"]:
                prometheus.query(written_out(each["expr"]))
            (forwards,) = prometheus.query("tacod_forwards_total")
            assert float(forwards["value"][1]) == 4
            busy = prometheus.query(written_out('tacod_device_memory_used_bytes{instance=~"$instance"}'))
            assert [each["metric"]["rank"] for each in busy] == ["0", "1"]
        finally:
            prometheus.process.terminate()
            prometheus.process.wait(SOON_S)


def written_out(expr: str) -> str:
    """A query as Grafana sends it."""
    for name, value in {"$instance": ".*", "$__rate_interval": "15s", "$__interval": "15s"}.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr
