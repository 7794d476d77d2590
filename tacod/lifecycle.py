"""The daemon's life cycle: reload, drain, stop, and its status for systemd."""

from __future__ import annotations

import logging
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from tacod.config import Config, ConfigError, load_config
from tacod.execution.executor import Executor
from tacod.execution.groups import preloaded
from tacod.notify import notify, watchdog_s
from tacod.serving import places
from tacod.serving.access import Keys
from tacod.serving.state import State
from tacod_client.errors import Unavailable

__all__ = ["FIXED", "Lifecycle"]

log = logging.getLogger("tacod")

FAREWELL_S = 5.0
"""How long clients that read slowly have for their last messages, after draining or when the ranks were given up."""
STATUS_S = 1.0
"""The least time between two status messages to systemd."""
PATIENCE_S = 60.0
"""How much longer systemd is asked to wait for a start or a stop, as long as the loop turns; other limits end these."""
FIXED = (
    "endpoint",
    "heartbeat_s",
    "group.device",
    "group.gpus",
    "group.ranks",
    "group.launcher",
    "group.ray_address",
    "group.min_ranks",
    "group.model_cache",
    "group.cuda_graphs",
    "group.prefix_bytes",
    "group.peer_memory",
    "group.warm_up",
    "comfyui.",
    "metrics.",
    "curve.listen",
)
"""Keys, and beginnings of keys, that a reload can't change; of one of several groups without its name."""
_OF_A_GROUP = re.compile(r"^group\.[^.]+\.")


class Lifecycle:
    """Does what signals and operators ask of the daemon: reload, drain, stop."""

    def __init__(self, state: State, config_path: str) -> None:
        self.state = state
        self.config_path = config_path
        self._drain_until: float | None = None
        self._gone_by: float | None = None
        """When the daemon ends at the latest, after its ranks were given up."""
        asked_s = watchdog_s()
        self._watched = asked_s is not None
        # Twice as often as asked, because a turn may take its second.
        self._pat_every_s = min(asked_s or PATIENCE_S, PATIENCE_S) / 2
        self._next_pat_s = self._next_status_s = 0.0
        self._status = ""

    def on_signal(self, number: int) -> None:
        """Act on a signal: SIGHUP reloads, SIGTERM and SIGINT drain, a second one of these aborts."""
        if number == signal.SIGHUP:
            try:
                self.reload()
            except ConfigError as error:
                for line in str(error).splitlines():
                    log.error("not reloaded: %s", line)
        elif self._drain_until is None:
            self.drain()
        else:
            self._drain_until = time.monotonic()

    def drain(self) -> int:
        """Refuse new work, end what runs, then stop; returns how many jobs there are to end."""
        groups = self.state.groups
        if self._drain_until is None:
            timeout_s = self.state.config.drain_timeout_s
            self._drain_until = time.monotonic() + timeout_s
            groups.drain()
            log.info("draining: %d jobs to finish, %g s at most", len(groups.jobs), timeout_s)
            notify("STOPPING=1", "STATUS=draining")
            self._next_pat_s = 0.0
        return len(groups.jobs)

    def reload(self) -> list[str]:
        """Read the configuration again and apply it; returns the keys that changed.

        Raises `ConfigError`, and then nothing has changed.
        """
        new, groups = load_config(self.config_path), self.state.groups
        names, known = sorted(group.name for group in new.groups), sorted(each.name for each in groups)
        if names != known:
            raise ConfigError(
                f"{self.config_path}:group: tacod runs groups {', '.join(known)}, and the file has {', '.join(names)}; "
                "groups can't come, go or change their names while tacod runs; restart it for that"
            )
        before, after = dict(_flat(self.state.config)), dict(_flat(new))
        # Of a section that comes or goes, all keys change.
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        for key in changed:
            if _OF_A_GROUP.sub("group.", key).startswith(FIXED):
                raise ConfigError(f"{self.config_path}:{key}: can't change while tacod runs; restart it for that")
        for executor in groups:
            try:
                new.group(executor.name).check_shares(executor.group.asked)
            except ValueError as error:
                raise ConfigError(f"{self.config_path}:{_key_of(new, executor.name)}: {error}") from None
        places.check(self.config_path, new)
        keys = Keys.read(self.config_path, new.curve)
        changed += [key for key in self.state.listener.access.changes(keys) if key not in changed]
        preload = preloaded(self.config_path, new, [each.group.world_size for each in groups])
        if new.log_level != self.state.config.log_level:
            logging.getLogger().setLevel(new.log_level.upper())
        self.state.apply_config(new, preload, keys)
        log.info("reloaded %s: %s", self.config_path, ", ".join(changed) or "nothing changed")
        return changed

    def turn(self) -> int | None:
        """Notify systemd and stop what is due; returns the exit code when the daemon is done."""
        now = time.monotonic()
        groups, sessions = self.state.groups, self.state.sessions
        # Only from here: a loop that is stuck falls silent.
        if now >= self._next_pat_s:
            self._next_pat_s = now + self._pat_every_s
            if self._watched:
                notify("WATCHDOG=1")
            if self._drain_until is not None or not groups.ready:
                notify(f"EXTEND_TIMEOUT_USEC={int(PATIENCE_S * 1e6)}")
        last = groups.given_up is not None
        if (last or now >= self._next_status_s) and (status := self._describe()) != self._status:
            self._next_status_s, self._status = now + STATUS_S, status
            notify(f"STATUS={status}")
        if groups.given_up is not None:
            self._gone_by = self._gone_by or now + FAREWELL_S
            if not sessions.pending or now >= self._gone_by:
                return 1
        if self._drain_until is None:
            return None
        if now >= self._drain_until and groups.jobs:
            info = "tacod was stopped before this job was done; it is safe to ask again"
            groups.abort(Unavailable(info, stopping=True))
        if groups.jobs or (sessions.pending and now < self._drain_until + FAREWELL_S):
            return None
        log.info("stopped")
        return 0

    def _describe(self) -> str:
        """The daemon's state in one line, for ``systemctl status``."""
        groups = self.state.groups
        if len(groups) == 1:
            return _describe(groups.executors[0])
        return "; ".join(f"{each.name}: {_describe(each)}" for each in groups)


def _describe(executor: Executor) -> str:
    """A group's state in one line."""
    ranks = _counted(executor.group.world_size, "rank")
    if executor.given_up is not None:
        return f"gave up: {executor.given_up}"
    if executor.loading is not None:
        return f"loading {executor.loading.name}"
    if executor.state == "degraded":
        return f"replacing {ranks}"
    if executor.state == "starting":
        return f"starting {ranks}"
    scheduler = executor.scheduler
    known = f"{_counted(len(list(executor.manifest)), 'model')} on {ranks}"
    job = scheduler.running
    doing = f"{job.verb.value}, step {job.step + 1} of {job.steps}" if job is not None else "idle"
    line = f"{executor.state}: {known}; {doing}"
    return f"{line}, {len(scheduler)} more queued" if len(scheduler) else line


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _flat(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a configuration, dotted, and their values."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(section, Config) and name == "groups":
            for group in section.groups:
                yield from _flat(group, f"{_key_of(section, group.name)}.")
        elif isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _key_of(config: Config, group: str) -> str:
    """The key of a group's table."""
    return "group" if len(config.groups) == 1 else f"group.{group}"
