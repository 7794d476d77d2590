"""Everything that the supervisor holds, for those who serve, report and reload it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tacod.config import Config
from tacod.execution.groups import Groups
from tacod.execution.manifest import Model
from tacod.group.shared_memory import SharedMemory
from tacod.observe.monitor import Monitor
from tacod.serving.access import Keys, User
from tacod.serving.guard import Guard
from tacod.serving.listener import Listener
from tacod.serving.sessions import Session, Sessions
from tacod.serving.uploads import Uploads
from tacod_client.errors import NotAllowed

__all__ = ["State"]

log = logging.getLogger(__name__)


@dataclass
class State:
    """The daemon's parts, for the modules that serve clients, report and reload."""

    config: Config
    boot_id: str
    started_s: float
    """On the monotonic clock."""
    listener: Listener
    sessions: Sessions
    groups: Groups
    monitor: Monitor
    uploads: Uploads
    guard: Guard

    def end_session(self, session: Session) -> None:
        """Forget a client, and end its queued jobs."""
        self.sessions.close(session)
        self.groups.drop(session.token)
        self.uploads.release(session.token)

    def share(self, token: bytes, user: User, nbytes: int, channel: socket.socket | None) -> SharedMemory:
        """Make a memory that a session shares with the ranks; it takes over the daemon's end of a ``channel``.

        Raises `NotAllowed` if the session isn't that user's, and what `Memories.make` raises.
        """
        session = self.sessions.get(token)
        if session is None or session.user.uid is None or session.user != user:
            raise NotAllowed(f"{user} has no such session; say hello on the socket of clients, and send its token")
        return self.groups.host.memories.make(token, nbytes, channel)

    def apply_config(self, config: Config, preload: Sequence[Iterable[Model]], keys: Keys | None) -> None:
        """Apply another configuration whose fixed keys (`lifecycle.FIXED`) are the same."""
        self.config = config
        self.sessions.limit, self.sessions.limit_per_user = config.limits.clients, config.limits.clients_per_user
        self.sessions.unsent_bytes = config.limits.share_bytes
        self.guard.limit = config.limits.held_bytes
        self.uploads.apply_config(config.models.uploads, config.models.upload_bytes)
        self.groups.apply_config(config, preload)
        access = self.listener.access
        old, access.keys = access.keys, keys
        for session in self.sessions:
            if not access.knows(session.user):
                log.info("client %s (pid %d, %s) is allowed no more", session.name, session.pid, session.user)
                self.end_session(session)
        if config.curve is not None and keys is not None and old is not None and keys.secret != old.secret:
            self.listener.rebind(config.curve.listen, keys)
