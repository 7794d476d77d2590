"""A group's ranks, whoever starts them: what is known of each, what starts and ends them, and the loss of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tacod import config
from tacod.group.arena import Arena
from tacod.group.work import Command, Fault, Progress
from tacod_client.errors import TacodError

__all__ = ["GroupLost", "Launcher", "Process", "Rank"]


class Process(Protocol):
    """What a rank's process is to those that look after it."""

    @property
    def pid(self) -> int:
        """Its number on its host."""

    def poll(self) -> int | None:
        """Its exit code, or a signal's number below zero; None while it runs."""


@dataclass
class Rank:
    """One process and its last reports."""

    index: int
    device: str
    process: Process
    host: str = ""
    """The name of the machine that it runs on; empty for this one."""
    ready: bool = False
    """Whether it has reported that it is ready."""
    memory_used_bytes: int = 0
    prefix_bytes: int = 0
    """Of these, bytes of the prefixes that it keeps."""
    progress: Progress | None = None
    """Of the load that it works on."""
    begun: int = 0
    """Forwards of its work item that it has begun, after the first."""


class Launcher(Protocol):
    """What starts a group's ranks, carries packets to and from them, and ends them: `Processes` or `RayLauncher`."""

    devices: list[str]
    """Of each rank that there is or is to be."""
    arena: Arena | None
    """The memory of commands and reports, as long as the ranks run."""
    room: int | None
    """How many ranks there could be, if new ones could be more than there are; else None."""
    sent: Progress | None
    """How much of a load's files has been sent to hosts that lack them; None if none were since the last command."""

    @property
    def ranks(self) -> Sequence[Rank]:
        """Those that have begun, in order."""

    @property
    def sources(self) -> list[int]:
        """File descriptors that become readable when ranks begin, report or end."""

    @property
    def starter(self) -> str:
        """In words, the process that starts the ranks."""

    def spawn(self, settings: config.Group, fault: Fault | None = None) -> None:
        """Start a new generation of ranks, with a ``fault`` on purpose. They report when they are ready."""

    def send(self, packet: bytes, command: Command, watched: bool, descriptors: Sequence[int] = ()) -> None:
        """Send every rank the packet of a command, with descriptors, without waiting.

        Raises `GroupLost` if one can't take it.
        """

    def receive(self) -> Iterator[tuple[Rank, bytes]]:
        """Take in the ranks that have begun, and give the packets that have come from them."""

    def check(self, ranks: Iterable[Rank]) -> None:
        """Raise `GroupLost` if one of these has ended, or what starts them before they were all there."""

    def log_stacks(self, ranks: Iterable[Rank]) -> None:
        """Log where these ranks hang."""

    def kill(self) -> None:
        """End all ranks at once; nothing of this generation remains."""

    def close(self) -> None:
        """After `kill`, end what starts the ranks."""


class GroupLost(Exception):
    """The ranks can't be used any more; says why."""

    def __init__(self, reason: str, error: TacodError | None = None, cause: str = "") -> None:
        super().__init__(reason)
        self.error = error
        """The error that one rank reported, if the others didn't agree."""
        self.cause = cause
        """What would happen again with the same work, without numbers that vary; empty for a cause from outside."""
