"""``tacoctl top``: what a frame shows, on a terminal and in a pipe, of a daemon in any state or of none."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tacod_client.cli import main, top
from tacod_client.errors import ConnectionLost

RANK = {"memory_used_bytes": 3 << 30, "memory_total_bytes": 24 << 30, "device_memory_used_bytes": 6 << 30}


def look(**changes: Any) -> dict[str, Any]:
    """What a daemon with three GPUs says in the midst of a sampling run."""
    ranks = [
        {**RANK, "rank": index, "pid": 100 + index, "device": str(3 + index), "device_name": "RTX", "utilization": 0.87}
        for index in range(3)
    ]
    status = {
        "state": "ready",
        "version": "1.2.3",
        "pid": 99,
        "uptime_s": 3700.0,
        "boot_id": "b",
        "endpoint": "ipc:///t.sock",
        "clients": 2,
        "queue": {"running": 1, "queued": 4},
        "group": {"device": "cuda", "world_size": 3, "restarts": 1, "ranks": ranks},
        "models": [
            {
                "name": "flux",
                "family": "flux",
                "weight_bytes": 5 << 30,
                "patches": 2,
                "dtype": "bf16",
                "plan": "sequence 3",
            }
        ],
    }
    stats = {
        "forwards_total": 10,
        "parallel_forwards_total": 9,
        "retried_forwards": 1,
        "jobs_total": {"result": 3, "failed": 1, "cancelled": 0},
        "step_s": {"mean": 0.2, "p50": 0.15, "p95": 0.4, "count": 10},
        "queue_s": 0.02,
        "wire_s": 0.02,
        "compute_s": 0.1,
        "collective_s": 0.06,
        "rx_bytes": 1000,
        "tx_bytes": 500,
    }
    job = {
        "job": "b-1",
        "verb": "sample",
        "state": "running",
        "step": 7,
        "total": 28,
        "client": "comfy (pid 5)",
        "age_s": 9.0,
    }
    told = {"time": 0.0, "endpoint": "ipc:///t.sock", "error": None, "rates": None}
    return {**told, "status": status, "stats": stats, "jobs": [job], **changes}


def shown(told: dict[str, Any], width: int = 100, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    console.print(top.frame(told))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_frame_shows_all_that_is_asked_of_it() -> None:
    text = shown(look())
    for words in (
        *("ready", "pid 99", "up 1 h 1 min", "1 group restarts", "ipc:///t.sock"),
        *("3 RTX", "5 RTX", "102", "3.0 GiB", "6.0 GiB of 24.0 GiB", "87 %"),
        *("1 running, 4 queued, 2 clients", "3 result, 1 failed", "1 forwards retried"),
        *("mean 200.0 ms, p50 150.0 ms, p95 400.0 ms", "compute 100.0 ms (50 %)", "collective 60.0 ms (30 %)"),
        *("7/28", "comfy (pid 5)", "flux + 2 patches", "5.0 GiB", "sequence 3"),
    ):
        assert words in text, words
    assert "\x1b" not in text


def test_rates_are_of_the_time_between_two_looks_at_one_run() -> None:
    before, now = look(), look()
    now["status"]["uptime_s"] += 2.0
    now["stats"] |= {"forwards_total": 20, "rx_bytes": 1000 + 4096, "tx_bytes": 500}
    rates = top._rates(before, now)
    assert rates == {"forwards_per_s": 5.0, "rx_bytes_per_s": 2048.0, "tx_bytes_per_s": 0.0}
    assert "5.0 forwards/s, 2.0 KiB/s in, 0 B/s out" in shown(look(rates=rates))
    now["status"]["boot_id"] = "another run"
    assert top._rates(before, now) is None
    assert top._rates(None, now) is None


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_frame_fits_any_width(width: int) -> None:
    for line in shown(look(), width).splitlines():
        assert len(line) <= width


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "━" not in shown(look())
    assert "█" not in shown(look())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    text = shown(look(), terminal=True)
    assert "━" in text
    assert text.count("█") == top.SPLIT


def test_what_is_not_known_is_said() -> None:
    told = look()
    for rank in told["status"]["group"]["ranks"]:
        for key in ("memory_total_bytes", "device_memory_used_bytes", "utilization", "device_name"):
            rank[key] = None
    assert shown(told).count("not known") == 6
    for rank in told["status"]["group"]["ranks"]:
        for key in ("memory_total_bytes", "device_memory_used_bytes", "utilization", "device_name"):
            del rank[key]
    assert shown(told).count("not known") == 6, "an older daemon doesn't tell them"


def test_a_group_that_is_down_and_a_daemon_that_did_nothing_are_shown() -> None:
    told = look(jobs=[])
    told["status"] |= {"state": "degraded", "models": []}
    told["status"]["group"]["ranks"] = []
    told["stats"]["step_s"] = {"mean": 0.0, "p50": 0.0, "p95": 0.0, "count": 0}
    text = shown(told)
    assert "degraded" in text
    assert "no rank is running; 3 are configured" in text


def test_a_daemon_that_is_away_is_tried_again(tmp_path: Path) -> None:
    looks = top._looks(f"ipc://{tmp_path}/none")
    for _ in range(2):
        told = next(looks)
        assert f"no tacod listens at ipc://{tmp_path}/none" in told["error"]
    assert "not reachable, trying" in shown(told)


def test_a_daemon_that_was_restarted_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(["first", "lost", "second"])
    clients: list[FakeClient] = []

    class FakeClient:
        def __init__(self, endpoint: str, **options: float) -> None:
            self.closed = False
            clients.append(self)

        def status(self) -> dict[str, Any]:
            moment = next(moments)
            if moment == "lost":
                raise ConnectionLost("gone; start it")
            return {**look()["status"], "boot_id": moment}

        def stats(self) -> dict[str, Any]:
            return {**look()["stats"]}

        def jobs(self) -> list[dict[str, Any]]:
            return []

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(top, "Client", FakeClient)
    looks = top._looks("ipc:///t.sock")
    assert [next(looks)["error"] for _ in range(3)] == [None, "gone; start it", None]
    assert [client.closed for client in clients] == [True, False]


def test_one_look_at_no_daemon_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--endpoint", f"ipc://{tmp_path}/none", "top", "--once"]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert "no tacod listens" in told.err


def test_json_is_a_document_a_look(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(top, "_looks", lambda endpoint: iter([look(), look(error="gone")]))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["top", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["error"] for line in lines] == [None, "gone"]
    monkeypatch.setattr(top, "_looks", lambda endpoint: iter([look()]))
    assert main(["top", "--json", "--once"]) == 0
    assert json.loads(capsys.readouterr().out)["status"]["pid"] == 99
