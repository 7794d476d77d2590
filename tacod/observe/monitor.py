"""Memory and load of the ranks' devices, measured once a second on a thread of its own.

A driver may take long to answer, or never answer for a lost GPU. So the daemon's loop only reads the last measurement.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

__all__ = ["Load", "Monitor"]

log = logging.getLogger(__name__)

EVERY_S = 1.0


@dataclass(frozen=True)
class Load:
    """Memory and load of one rank's device; None for what could not be measured."""

    name: str | None = None
    memory_used_bytes: int | None = None
    """By all processes."""
    memory_total_bytes: int | None = None
    utilization: float | None = None
    """From 0 to 1: of a GPU the share of time in which it had work, of a CPU the rank's share of all cores."""


Ranks = Iterable[tuple[int, str]]
"""The pid and the device of each."""


class Monitor:
    """Measures the load of each rank; ``ranks`` gives their pids and devices, and is called on the monitor's thread."""

    def __init__(self, kind: str, ranks: Callable[[], Ranks]) -> None:
        self._ranks = ranks
        self._open: Callable[[], Callable[[Ranks], dict[int, Load]]] = _Gpus if kind == "cuda" else _Cpus
        self._loads: dict[int, Load] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._thread.start()

    def load(self, pid: int) -> Load:
        """The last measurement of a rank."""
        return self._loads.get(pid, Load())

    def close(self) -> None:
        """Stop measuring; a call that hangs in the driver is abandoned."""
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        try:
            look = self._open()
        except Exception:
            # The numbers are for looking at; no work depends on them.
            log.exception("the devices are not watched")
            return
        fails = False
        while not self._stop.wait(EVERY_S):
            try:
                self._loads = look(self._ranks())
                fails = False
            except Exception:
                # It is tried again: descriptors may be short, for one.
                if not fails:
                    log.exception("the devices can't be looked at now")
                fails, self._loads = True, {}


class _Cpus:
    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}

    def __call__(self, ranks: Ranks) -> dict[int, Load]:
        memory = psutil.virtual_memory()
        known, self._processes = self._processes, {}
        loads = {}
        for pid, _ in ranks:
            busy = None
            with suppress(psutil.Error):
                # It gives the time used since the last call, so the object is kept.
                process = known.get(pid) or psutil.Process(pid)
                busy = min(process.cpu_percent() / 100 / (psutil.cpu_count() or 1), 1.0)
                self._processes[pid] = process
            loads[pid] = Load("cpu", memory.total - memory.available, memory.total, busy)
        return loads


class _Gpus:
    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._handles: dict[str, Any] = {}

    def __call__(self, ranks: Ranks) -> dict[int, Load]:
        return {pid: self._load(device) for pid, device in ranks}

    def _load(self, device: str) -> Load:
        nvml = self._nvml
        name = memory = busy = None
        # Each is told apart: some cards and partitions have the one but not the other.
        with suppress(nvml.NVMLError):
            handle = self._handle(device)
            name = str(nvml.nvmlDeviceGetName(handle))
            with suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            with suppress(nvml.NVMLError):
                busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return Load(name, memory and int(memory.used), memory and int(memory.total), busy)

    def _handle(self, device: str) -> Any:
        if device not in self._handles:
            find = self._nvml.nvmlDeviceGetHandleByIndex if device.isdigit() else self._nvml.nvmlDeviceGetHandleByUUID
            self._handles[device] = find(int(device) if device.isdigit() else device)
        return self._handles[device]
