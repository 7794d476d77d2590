"""The daemon's report on itself: the replies to ``status``, ``stats`` and such, and the source of what is exported.

Where there are several groups, what is of one says so: ``group`` has its name.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from tacod import __version__
from tacod.execution.executor import Executor
from tacod.execution.manifest import Model
from tacod.execution.scheduler import Job
from tacod.group.ranks import Rank
from tacod.observe.exporter import GroupReading, Reading
from tacod.observe.metrics import Metrics
from tacod.observe.monitor import Load
from tacod.serving.state import State

__all__ = ["jobs", "loaded", "models", "reading", "stats", "status", "totals"]


def status(state: State) -> dict[str, Any]:
    """The state of the daemon now."""
    groups = [_group(state, executor) for executor in state.groups]
    several = len(groups) > 1
    ranks = [rank | ({"group": each["name"]} if several else {}) for each in groups for rank in each["ranks"]]
    return {
        "state": state.groups.state,
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(time.monotonic() - state.started_s, 3),
        "boot_id": state.boot_id,
        "endpoint": state.config.endpoint,
        "group": {
            "device": state.config.device,
            "world_size": sum(each["world_size"] for each in groups),
            "asked_ranks": sum(each["asked_ranks"] for each in groups),
            "restarts": state.groups.restarts,
            "ranks": ranks,
        },
        "groups": groups,
        "models": models(state),
        "queue": {key: sum(each["queue"][key] for each in groups) for key in ("running", "queued")},
        "clients": len(state.sessions),
    }


def _group(state: State, executor: Executor) -> dict[str, Any]:
    scheduler = executor.scheduler
    return {
        "name": executor.name,
        "state": executor.state,
        "device": state.config.device,
        "world_size": executor.group.world_size,
        "asked_ranks": executor.group.asked,
        "restarts": executor.group.restarts,
        "ranks": [_rank(state, rank) for rank in executor.group.ranks],
        "queue": {"running": int(scheduler.running is not None), "queued": len(scheduler)},
        "models": [model.to_wire() for model in executor.manifest],
    }


def _rank(state: State, rank: Rank) -> dict[str, Any]:
    # Those on other hosts are not measured here.
    load = Load() if rank.host else state.monitor.load(rank.process.pid)
    return {
        "rank": rank.index,
        "host": rank.host or socket.gethostname(),
        "pid": rank.process.pid,
        "device": rank.device,
        "device_name": load.name,
        "memory_used_bytes": rank.memory_used_bytes,
        "prefix_bytes": rank.prefix_bytes,
        "memory_total_bytes": load.memory_total_bytes,
        "device_memory_used_bytes": load.memory_used_bytes,
        "utilization": load.utilization,
    }


def models(state: State) -> list[dict[str, Any]]:
    """The loaded models, each once: as the first of the groups that hold it has it."""
    found: dict[str, dict[str, Any]] = {}
    for executor in state.groups:
        for model in executor.manifest:
            told = found.setdefault(model.id, model.to_wire())
            if len(state.groups) > 1:
                told.setdefault("groups", []).append(executor.name)
    return list(found.values())


def loaded(executor: Executor, model: Model) -> dict[str, Any]:
    """The reply to the load of a ``model`` that a group holds now."""
    ranks = executor.group.world_size
    told = executor.manifest.find(model.id).planned(model.asked, ranks).to_wire()
    return {"model": {**told, **_name(executor)}}


def jobs(state: State) -> list[dict[str, Any]]:
    """The running jobs and the queued ones."""
    return [_job(state, executor, job) for executor in state.groups for job in executor.scheduler.jobs]


def _job(state: State, executor: Executor, job: Job) -> dict[str, Any]:
    running = job is executor.scheduler.running
    far = executor.group.blocks if running else None
    owner = state.sessions.get(job.session)
    return {
        "job": job.id,
        "verb": job.verb.value,
        "state": "running" if running else "queued",
        "model": job.model,
        "step": job.step,
        "total": job.steps,
        "block": far.done if far is not None else None,
        "blocks": far.total if far is not None else None,
        "client": f"{owner.name} (pid {owner.pid}, {owner.user})" if owner else None,
        "age_s": round(time.monotonic() - job.submitted_s, 3),
        **_name(executor),
    }


def _name(executor: Executor) -> dict[str, str]:
    return {"group": executor.name} if len(executor.config.groups) > 1 else {}


def totals(state: State) -> dict[str, Any]:
    """The counts since the start; they cost the daemon's loop next to nothing."""
    return {**_metrics(state).totals(), **_host(state)}


def stats(state: State) -> dict[str, Any]:
    """The counts since the start, with the times of the last steps."""
    groups = [{"name": each.name, **each.records.metrics.to_wire(), **_restarts(each)} for each in state.groups]
    return {**_metrics(state).to_wire(), **_host(state), "groups": groups}


def _metrics(state: State) -> Metrics:
    return Metrics.sum(each.records.metrics for each in state.groups)


def _restarts(executor: Executor) -> dict[str, int]:
    return {"group_restarts": executor.group.restarts}


def _host(state: State) -> dict[str, Any]:
    host = state.groups.host
    return {
        "rx_bytes": state.sessions.rx_bytes,
        "tx_bytes": state.sessions.tx_bytes,
        "store": {"bytes": host.store.nbytes, "hits": host.store.hits, "misses": host.store.misses},
        "shared_bytes": host.memories.nbytes,
        "group_restarts": state.groups.restarts,
    }


def reading(state: State) -> Reading:
    """What the exporter shows, as it is now."""
    told = status(state)
    groups = [
        GroupReading.take(of_group, {**each.records.metrics.totals(), **_restarts(each)}, each.records.metrics)
        for of_group, each in zip(told["groups"], state.groups, strict=True)
    ]
    return Reading(told, totals(state), groups)
