"""A Ray cluster whose hosts are network namespaces of this machine, with a switch between them.

Each has addresses of its own, an interface that leads nowhere beside the one to the others, a name, and a /tmp of its
own but for the first, where tacod runs: nothing but the network is shared. All of it needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from helpers import eventually
from ray_cluster import QUIET

__all__ = ["NamespaceCluster", "NamespaceHost", "why_not"]

START_S = 120.0
"""Longer than a raylet takes to start on a busy machine."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if any(shutil.which(each) is None for each in ("ip", "unshare")):
        return "there is no ip or unshare: install iproute2 and util-linux"
    name = f"tacod-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        _ip("-n", name, "link", "add", "switch", "type", "bridge")
    except AssertionError as error:
        return f"no network namespaces can be made here ({error})"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


@dataclass
class NamespaceHost:
    """A host: its namespace, and the number that its addresses end in."""

    name: str
    number: int

    @property
    def address(self) -> str:
        """That by which the others reach it."""
        return f"10.97.0.{self.number}"

    @property
    def inside(self) -> list[str]:
        """What a command begins with that runs there."""
        return ["ip", "netns", "exec", self.name]

    def pids(self) -> list[int]:
        """Everything that runs there."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]


class NamespaceCluster:
    """Hosts that can be added, and cut off from the others."""

    def __init__(self) -> None:
        self._prefix = f"tacod{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self.hosts: list[NamespaceHost] = []
        self._temporary = tempfile.mkdtemp(prefix="tacod-ray-")
        self._raylets: list[subprocess.Popen[bytes]] = []
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            self.head = self.add()
            """The host with the cluster's head, on which tacod runs."""
            self.second = self.add()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """The cluster's."""
        return f"{self.head.address}:6379"

    def add(self, cpus: int = 2) -> NamespaceHost:
        """Another host, once it is in the cluster."""
        host = NamespaceHost(f"{self._prefix}-{len(self.hosts) + 1}", len(self.hosts) + 1)
        _ip("netns", "add", host.name)
        self.hosts.append(host)
        _ip("-n", host.name, "link", "set", "lo", "up")
        # The first interface leads nowhere.
        self._connect(host, f"nowhere{host.number}", "eth0", f"192.0.2.{host.number}")
        self._connect(host, self._port(host), "eth1", host.address)
        _ip("-n", self._switch, "link", "set", self._port(host), "master", "switch")
        self._start(host, cpus)
        return host

    @staticmethod
    def _port(host: NamespaceHost) -> str:
        return f"port{host.number}"

    def _connect(self, host: NamespaceHost, port: str, interface: str, address: str) -> None:
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", interface, "netns", host.name)
        _ip("-n", host.name, "address", "add", f"{address}/24", "dev", interface)
        _ip("-n", self._switch, "link", "set", port, "up")
        _ip("-n", host.name, "link", "set", interface, "up")

    def _start(self, host: NamespaceHost, cpus: int) -> None:
        first = len(self.hosts) == 1
        where = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={self._temporary}"]
        words = where if first else [f"--address={self.address}"]
        words += [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--num-gpus=0"]
        words += [f"--object-store-memory={100 << 20}", "--disable-usage-stats", "--block"]
        setup = f"hostname {host.name}"
        if not first:
            setup += " && mount -t tmpfs tmpfs /tmp"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
        command = [*host.inside, "unshare", "--uts", "--mount", "sh", "-c", f'{setup} && exec "$@"', "sh", *ray]
        log = f"{self._temporary}-{host.number}.log"
        with open(log, "wb") as output:
            started = subprocess.Popen(
                command,
                env={**os.environ, **QUIET, "HOME": "/tmp"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._raylets.append(started)

        def runs() -> bool:
            with open(log, errors="replace") as text:
                told = text.read()
            assert started.poll() is None, told
            return "Ray runtime started" in told

        eventually(runs, START_S, f"a raylet of host {host.number}", every_s=0.2)

    def cut(self, host: NamespaceHost) -> None:
        """Have a host be gone without a word: nothing is reset, no process ends."""
        _ip("-n", self._switch, "link", "set", self._port(host), "down")

    def close(self) -> None:
        """End all that runs there, and all namespaces."""
        for host in self.hosts:
            for pid in host.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for raylet in self._raylets:
            raylet.wait()
        for name in [host.name for host in self.hosts] + [self._switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(self._temporary, ignore_errors=True)
        for host in self.hosts:
            with suppress(FileNotFoundError):
                Path(f"{self._temporary}-{host.number}.log").unlink()
