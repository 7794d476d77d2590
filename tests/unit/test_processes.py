"""What a rank's process finds in its environment."""

from __future__ import annotations

import json
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tacod.group.fork_server import ForkServer
from tacod.group.processes import _environment


def test_gpus_ranks_keep_nccl_from_taking_pieces_of_memory_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph, with segments that expand: else ranks hang in a replay."""
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:1")
    found = _environment("cuda", ["3", "4"])
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert found["NCCL_GRAPH_REGISTER"] == "0"
    assert (found["CUDA_VISIBLE_DEVICES"], found["CUDA_DEVICE_ORDER"]) == ("3,4", "PCI_BUS_ID")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_what_is_meant_for_another_process_stays_away(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NOTIFY_SOCKET", "RANK", "MASTER_ADDR", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    found = _environment(kind, ["0"])
    assert not {"NOTIFY_SOCKET", "RANK", "MASTER_ADDR", "CUDA_DEVICE_MAX_CONNECTIONS"} & found.keys()
    assert found["SOMETHING_ELSE"] == "1"
    assert found["CUDA_VISIBLE_DEVICES"] == ("0" if kind == "cuda" else "")


def test_orphans_are_adopted_as_long_as_any_group_forks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise ranks of one group would be children of the init process, as another group has all of its own."""
    adopts: list[bool] = []
    monkeypatch.setattr("tacod.group.fork_server.prctl.adopt_orphans", adopts.append)
    with ExitStack() as stack:
        servers, ends = [], []
        for _ in range(2):
            server = ForkServer("cpu", tmp_path, {})
            server._socket, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            server._socket.setblocking(False)
            for each in (server._socket, end):
                stack.enter_context(each)
            server.fork(0, [], end.fileno(), end.fileno())
            servers.append(server)
            ends.append(end)
        for server, end, others in zip(servers, ends, (True, False), strict=True):
            assert server.forked() == []
            assert adopts[-1], "one is still to come"
            end.send(json.dumps([0, os.getpid()]).encode())
            ((rank, child),) = server.forked()
            stack.callback(os.close, child.fd)
            assert (rank, child.pid, adopts[-1]) == (0, os.getpid(), others)
