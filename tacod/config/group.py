"""A group of ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, model_validator

from tacod.config.section import Count, CountOrZero, Section, check_absolute
from tacod.shares import MOST, Shares

__all__ = ["Group", "check_apart"]


def _check_shares(shares: Any) -> Any:
    if shares == "auto":
        return shares
    if isinstance(shares, list) and shares and all(type(each) is int and 1 <= each <= MOST for each in shares):
        return shares
    raise ValueError(f'expected "auto" or a whole number from 1 to {MOST} for each rank, such as [2, 1, 1]')


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", name):
        raise ValueError(f"expected 1 to 32 letters, digits, - and _, got {name!r:.80}")
    return name


def _check_ray(address: str) -> str:
    if address.startswith("ray://"):
        raise ValueError(
            "Ray's client (ray://) can't carry tensors to several hosts; have this machine join the cluster "
            '(`ray start --address=HOST:6379 --num-gpus=0`), and set "auto"'
        )
    if address == "auto" or (":" in address and address.rpartition(":")[2].isdecimal() and "/" not in address):
        return address
    raise ValueError(
        f'expected "auto" or the HOST:PORT of the cluster\'s head, such as "10.0.0.1:6379"; got {address!r}'
    )


def _check_cache(folder: str) -> str:
    return folder if folder.startswith("~/") and "\0" not in folder else check_absolute(folder)


class Group(Section):
    """The ranks: which devices, and how long to wait for them."""

    name: Annotated[str, AfterValidator(_check_name)] = "0"
    """What status, metrics and the log call the group; in an array of tables by default its place, from 0 on."""
    device: Literal["cuda", "cpu"] = "cuda"
    gpus: list[CountOrZero | str] | None = None
    """For ``cuda``: indexes as nvidia-smi shows them, or UUIDs; all GPUs if absent."""
    ranks: Count = Field(1, le=64)
    """For ``cpu``: how many processes; for ``launcher = "ray"``: how many GPUs of the cluster, one for each rank."""
    launcher: Literal["local", "ray"] = "local"
    """What starts the ranks: tacod, on this machine, or Ray, on the hosts of a cluster that there is already."""
    ray_address: Annotated[str, AfterValidator(_check_ray)] | None = None
    """For ``ray``: the cluster, as HOST:PORT of its head, or ``auto`` for the one that this machine is in."""
    min_ranks: Count | None = None
    """For ``ray``: with how many ranks to go on when hosts of the cluster are lost, and to start; by default with one,
    and to start only with all."""
    model_cache: Annotated[str, AfterValidator(_check_cache)] = "~/.cache/tacod/models"
    """For ``ray``: the folder on each host for model files that it lacks and tacod's host sends; ``~`` is the home of
    the user that Ray runs as."""
    model_cache_bytes: CountOrZero = 200 << 30
    """Most bytes of that folder; the least recently used models leave. With 0 none are sent, and such loads refused."""
    step_timeout_s: PositiveFloat = 120.0
    """Longest time that one forward may take before the ranks count as stuck; a step may have several."""
    load_timeout_s: PositiveFloat = 900.0
    """Longest time without progress of a load."""
    start_timeout_s: PositiveFloat = 180.0
    retries: CountOrZero = 2
    """How many times a step is run again on new ranks before its job fails."""
    max_restarts: CountOrZero = 5
    """More restarts of the group than this within `restart_window_s`, and tacod gives up."""
    restart_window_s: PositiveFloat = 600.0
    cache_bytes: Count = 1 << 30
    """Client tensors that each rank keeps, so that a prompt's embeddings travel once."""
    prefix_bytes: CountOrZero = 4 << 30
    """Memory of each rank for what doesn't change from step to step, such as a text's keys and values (Qwen-Image-2.1);
    CUDA graphs may take as much again. With 0 it is computed at each step, and such a model has no CUDA graphs."""
    cuda_graphs: bool = True
    """Whether repeated forwards are replayed as CUDA graphs. Turn it off to see whether they cause a problem."""
    peer_memory: bool = True
    """Whether a Ulysses group's GPUs exchange through each other's memory, or else the host's, instead of NCCL."""
    warm_up: bool = True
    """Whether a load on GPUs runs and measures forwards of 1024 pixels. Turn it off for cards that have no room for
    these."""

    shares: Annotated[Literal["auto"] | list[int], BeforeValidator(_check_shares)] = "auto"
    """How much of each forward each rank takes, such as [2, 1, 1]; by default by its pace, which a load on GPUs
    measures. Equal numbers turn that off. A change is for models that are loaded from then on."""

    @property
    def asked_shares(self) -> Shares | None:
        """The shares that are set here; None to measure them."""
        return None if self.shares == "auto" else Shares.of(self.shares)

    def check_shares(self, ranks: int) -> None:
        """Raise `ValueError` if there is not one share for each of so many ranks."""
        if self.shares != "auto" and len(self.shares) != ranks:
            raise ValueError(f"shares: expected a number for each of {ranks} ranks, got {len(self.shares)}")

    @model_validator(mode="after")
    def _one_kind_of_device(self) -> Group:
        if self.device == "cpu" and self.gpus is not None:
            raise ValueError('gpus is for device = "cuda"; on "cpu" set ranks')
        if self.gpus is not None and (not self.gpus or len(set(self.gpus)) != len(self.gpus)):
            raise ValueError("gpus must name each device once, and at least one")
        if self.launcher == "ray":
            self._check_on_ray()
            return self
        if self.ray_address is not None or self.min_ranks is not None:
            raise ValueError('ray_address and min_ranks are for launcher = "ray"; remove them, or set that')
        if self.device == "cuda" and "ranks" in self.model_fields_set:
            raise ValueError('ranks is for device = "cpu"; on "cuda" there is one rank for each of gpus')
        if self.device == "cpu" or self.gpus is not None:
            self.check_shares(self.ranks if self.gpus is None else len(self.gpus))
        return self

    def _check_on_ray(self) -> None:
        if self.gpus is not None:
            raise ValueError('with launcher = "ray" the cluster chooses the GPUs; set ranks, their number')
        if self.device == "cuda" and "ranks" not in self.model_fields_set:
            raise ValueError('with launcher = "ray" set ranks: how many GPUs of the cluster')
        if self.min_ranks is not None and self.min_ranks > self.ranks:
            raise ValueError(f"min_ranks = {self.min_ranks} is more than ranks = {self.ranks}")
        self.check_shares(self.ranks)
        if self.shares != "auto" and self.min_ranks not in (None, self.ranks):
            raise ValueError("shares has a number for each of ranks, so there can be no fewer: remove min_ranks")

    @property
    def fewest_ranks(self) -> int:
        """On Ray, the number of ranks with which to go on when hosts are lost."""
        if self.shares != "auto":
            return self.ranks
        return self.min_ranks or 1


def check_apart(gpus: Sequence[int | str], named: Sequence[tuple[int | str, str]]) -> None:
    """Raise `ValueError` if two of these ``gpus`` are the same; ``named`` says what each is called, and by whom."""
    seen: dict[int | str, tuple[int | str, str]] = {}
    for gpu, (called, group) in zip(gpus, named, strict=True):
        if gpu in seen:
            before, owner = seen[gpu]
            if owner == group:
                raise ValueError(f"group {group!r} has GPU {called!r} twice (also as {before!r}); name it once")
            also = "" if before == called else f" (there {before!r})"
            raise ValueError(f"group {group!r}: GPU {called!r} is in group {owner!r} too{also}; leave it to one")
        seen[gpu] = called, group
