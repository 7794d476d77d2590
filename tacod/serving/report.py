"""The daemon's report on itself: the replies to ``status`` and ``stats``, and the source of what is exported."""

from __future__ import annotations

import os
import time
from typing import Any

from tacod import __version__
from tacod.group.processes import Rank
from tacod.observe.monitor import Monitor
from tacod.serving.state import State

__all__ = ["stats", "status", "totals"]


def status(state: State) -> dict[str, Any]:
    """The state of the daemon now."""
    executor = state.executor
    return {
        "state": executor.state,
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(time.monotonic() - state.started_s, 3),
        "boot_id": state.boot_id,
        "endpoint": state.config.endpoint,
        "group": {
            "device": state.config.group.device,
            "world_size": executor.group.world_size,
            "restarts": executor.group.restarts,
            "ranks": [_rank(rank, state.monitor) for rank in executor.group.ranks],
        },
        "models": [model.to_wire() for model in executor.manifest],
        "queue": {"running": int(executor.scheduler.running is not None), "queued": len(executor.scheduler)},
        "clients": len(state.sessions),
    }


def _rank(rank: Rank, monitor: Monitor) -> dict[str, Any]:
    load = monitor.load(rank.process.pid)
    return {
        "rank": rank.index,
        "pid": rank.process.pid,
        "device": rank.device,
        "device_name": load.name,
        "memory_used_bytes": rank.memory_used_bytes,
        "prefix_bytes": rank.prefix_bytes,
        "memory_total_bytes": load.memory_total_bytes,
        "device_memory_used_bytes": load.memory_used_bytes,
        "utilization": load.utilization,
    }


def totals(state: State) -> dict[str, Any]:
    """The counts since the start; they cost the daemon's loop next to nothing."""
    executor, store = state.executor, state.executor.store
    return {
        **executor.records.metrics.totals(),
        "tx_bytes": state.sessions.tx_bytes,
        "store": {"bytes": store.nbytes, "hits": store.hits, "misses": store.misses},
        "shared_bytes": executor.memories.nbytes,
        "group_restarts": executor.group.restarts,
    }


def stats(state: State) -> dict[str, Any]:
    """The counts since the start, with the times of the last steps."""
    return {**state.executor.records.metrics.to_wire(), **totals(state)}
