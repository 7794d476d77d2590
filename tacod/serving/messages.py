"""Bodies of clients' requests: a frozen pydantic model each (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from tacod.execution.store import tensors_of
from tacod_client import wire
from tacod_client.dtypes import ComputeDtype, Weights
from tacod_client.errors import ArgumentError

__all__ = [
    "REQUESTS",
    "BeginUpload",
    "Cancel",
    "Empty",
    "Forward",
    "Hello",
    "Load",
    "Piece",
    "Put",
    "RequestBody",
    "Sample",
    "Unload",
    "Unshare",
    "parse",
]

VALUES = 512
"""Most values, keys among them, that `plan`, `arguments`, `positive` and `negative` may hold each."""
TEXT = 256
"""Most characters of a text in them."""
PATCH_TENSORS = 6000
"""Most tensors that a load's patches may hold; the ranks get each twice in one message, by name and with its bytes."""

LATENTS = 16
"""Most latents of a sampling run."""
PATCH_BYTES = 2 << 20
"""Most bytes of names and numbers in them; each value counts 9 bytes beyond its text."""


def _check_extent(value: Any) -> Any:
    """Limit a value's size: the supervisor adds to what it sends to the ranks, and all of it must fit in a message."""
    for seen, item in enumerate(_values_of(value), 1):
        if seen > VALUES:
            raise ValueError(f"holds more than {VALUES} values")
        if isinstance(item, str | bytes) and len(item) > TEXT:
            raise ValueError(f"holds a text of {len(item)} characters; at most {TEXT} are allowed")
    return value


def _values_of(value: Any) -> Iterator[Any]:
    """A value and all that it holds, keys too."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        yield item
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item


def _text_bytes(value: Any) -> int:
    return len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, bytes) else 0


def _check_patches(patches: list[Any] | None) -> list[Any] | None:
    count = sum(1 for _ in tensors_of(patches))
    if count > PATCH_TENSORS:
        raise ValueError(f"holds {count} tensors; at most {PATCH_TENSORS} are allowed: save the merged model instead")
    size = sum(9 + _text_bytes(item) for item in _values_of(patches))
    if size > PATCH_BYTES:
        raise ValueError(f"holds {size} bytes of names and numbers; at most {PATCH_BYTES} are allowed")
    return patches


def _check_latents(value: Any) -> Any:
    """A tensor, or a list of such where a model has several latents."""
    several = value if isinstance(value, list) else [value]
    if not several or len(several) > LATENTS or not all(isinstance(each, wire.Tensor) for each in several):
        raise ValueError(f"expected a tensor, or a list of at most {LATENTS} tensors")
    return value


Tensor = InstanceOf[wire.Tensor]
Latents = Annotated[Any, AfterValidator(_check_latents)]
Name = Annotated[str, Field(max_length=4096)]
Plan = Annotated[Any, AfterValidator(_check_extent)]
Arguments = Annotated[dict[str, Any], AfterValidator(_check_extent)]


class RequestBody(BaseModel):
    """A request's body: no field is allowed but these, and all are required that have no default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Empty(RequestBody):
    """A request without fields."""


class Hello(RequestBody):
    """Open a session."""

    client: Name
    pid: int
    version: Name


class Put(RequestBody):
    """Keep these tensors by content."""

    tensors: Annotated[list[Tensor], Field(max_length=256)]


class BeginUpload(RequestBody):
    """Announce a model file, by its size and the digests of its pieces."""

    nbytes: Annotated[int, Field(ge=1)]
    digests: Annotated[list[bytes], Field(max_length=1 << 16)]


class Piece(RequestBody):
    """A piece of an announced file."""

    upload: Name
    offset: Annotated[int, Field(ge=0)]
    data: Tensor


class Load(RequestBody):
    """Make a model resident."""

    path: Name
    dtype: ComputeDtype | None
    patches: Annotated[list[Any] | None, AfterValidator(_check_patches)]
    plan: Plan
    weights: Weights = "auto"


class Unload(RequestBody):
    """Give a model's memory back."""

    model: Name


class Forward(RequestBody):
    """One DiT forward."""

    model: Name
    plan: Plan
    arguments: Arguments
    memory: int | None = None
    room: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None


class Unshare(RequestBody):
    """Give a shared memory back."""

    memory: int


class Call(RequestBody):
    """What a network does outside of a forward."""

    model: Name
    method: Name
    arguments: Arguments


class Sample(RequestBody):
    """A whole sampling run."""

    model: Name
    plan: Plan
    sampler: Name
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    cfg: Annotated[float, Field(allow_inf_nan=False)]
    noise: Latents
    latent: Latents
    sigmas: Tensor
    positive: Arguments
    negative: Arguments | None


class Cancel(RequestBody):
    """Cancel a job by its id, or one of this session's requests by the message id."""

    job: Name | None
    request: int | None


REQUESTS: dict[str, type[RequestBody]] = {
    "hello": Hello,
    "bye": Empty,
    "ping": Empty,
    "put": Put,
    "begin_upload": BeginUpload,
    "piece": Piece,
    "load": Load,
    "unload": Unload,
    "unshare": Unshare,
    "forward": Forward,
    "call": Call,
    "sample": Sample,
    "cancel": Cancel,
    "status": Empty,
    "stats": Empty,
    "models": Empty,
    "ps": Empty,
    "reload": Empty,
    "drain": Empty,
}

Kind = TypeVar("Kind", bound=RequestBody)


def parse(kind: type[Kind], body: dict[str, Any]) -> Kind:
    """The checked body of a request. Raises `ArgumentError`, naming the first field at fault."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))[:TEXT] or kind.__name__.lower()
        reason = fault["msg"].removeprefix("Value error, ")
        raise ArgumentError(f"{name}: {reason[:1].lower()}{reason[1:]}", argument=name) from None
