"""How the GPUs of a group exchange, by what they reach: each other's memory, or the host's, or neither of itself."""

from __future__ import annotations

from tacod.rank.comm.group import Group
from tacod.rank.comm.peers import reach_peers
from tacod.rank.comm.staging import reach_host

__all__ = ["reach"]


def reach(group: Group) -> None:
    """Give a group of GPUs the fastest way there is; without any it is left to NCCL. All of its ranks call it."""
    group.peers = reach_peers(group)
    if group.peers is None:
        group.staging = reach_host(group)
