"""Messages between the supervisor and its ranks: commands go down in an envelope, reports come up.

Both sides always have the same version. Only this module knows how a message is laid out in an arena's `Message`: a
command's type is its verb, and its fields and the envelope's are keys of one body.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from tacod_client import wire
from tacod_client.errors import ProtocolError, TacodError
from tacod_client.wire import Buffer, Form, Message, Tensor, map_tensors

__all__ = [
    "Alike",
    "Begun",
    "Broken",
    "Command",
    "Done",
    "Envelope",
    "Evict",
    "Facts",
    "Failed",
    "Fault",
    "Final",
    "Forward",
    "Load",
    "Loaded",
    "MethodCall",
    "Progress",
    "Raised",
    "Ready",
    "Report",
    "Sample",
    "SampleStep",
    "Stepped",
    "Unload",
    "as_tensor",
    "pack_done",
    "read_done",
    "read_envelope",
    "read_report",
    "report_message",
    "with_tensors",
]

PartType = TypeVar("PartType", bound="Part")
NUMBERS = struct.Struct("<QddQ")
"""The numbers of a `Done`."""
_REQUEST = struct.Struct("<Q")


@dataclass(frozen=True)
class Part:
    """Part of a message: each field is a key of the body."""

    def body(self) -> dict[str, Any]:
        """The fields as they are sent."""
        return dict(vars(self))

    @classmethod
    def read(cls: type[PartType], body: Mapping[str, Any]) -> PartType:
        """The part that a body holds, among other keys."""
        return cls(**{each.name: body[each.name] for each in fields(cls) if each.name in body})


# --- down -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load(Part):
    """Make a model resident, and evict ``evict_models`` for it."""

    verb: ClassVar[str] = "load"
    model: str
    path: str
    identity: str
    """Of the file, as the supervisor saw it."""
    dtype: str | None
    patches: list[Any] | None
    base: str | None
    """The id of the model without patches, which is loaded too; None if there are no patches."""
    evict_models: list[str]
    files: dict[str, str] = field(default_factory=dict)
    """The identity of each file that the patches name, by its path."""
    weights: str = "auto"
    """Where the weights are to lie (`tacod.rank.weights.placement`)."""
    memory_bytes: int | None = None
    """How many bytes of weights each rank may hold."""
    fewer: int = 0
    """By how many blocks each rank stays below that, as it ran out of memory before."""
    shares: list[int] | None = None
    """How much of its forwards each rank takes (`tacod.shares`), empty if all take the same; None to measure it."""
    shares_measured: bool = False
    """Whether an earlier load has measured them; otherwise the configuration asks for them."""
    rates: list[float] | None = None
    """The `DeviceRates` that an earlier load has found, empty if it found none; None to measure them."""
    roots: list[str] = field(default_factory=list)
    """The folders in which files may lie, for ranks on other hosts than the supervisor's."""
    refused: dict[str, Any] | None = None
    """Why ranks refuse it, as a `TacodError` on the wire: one of their hosts lacks a file."""


@dataclass(frozen=True)
class Unload(Part):
    """Unload a model and those that are made of it by patches; their sampling runs end."""

    verb: ClassVar[str] = "unload"
    model: str
    evict_models: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evict(Part):
    """Unload models; their sampling runs keep their progress."""

    verb: ClassVar[str] = "evict"
    models: list[str]


@dataclass(eq=False)
class Alike:
    """What forwards have in common whose requests differ in tensors' bytes alone: it is found out once."""

    shapes: Hashable
    """Of their arguments."""
    tails: dict[tuple[bool, bool], bytes] = field(default_factory=dict)
    """The `tail_of` their commands that bring nothing else, by whether they are watched, and whether rank 0 tells the
    client of their completion."""


@dataclass(frozen=True)
class Forward(Part):
    """One forward with the meaning of ComfyUI's ``diffusion_model(x, timestep, …)``."""

    verb: ClassVar[str] = "forward"
    model: str
    plan: Any
    arguments: dict[str, Any]
    session: bytes
    """To the step cache, the forwards of one session may be steps of one run."""
    memory: int | None = None
    """The id of the memory shared with the client in which latents with an offset lie."""
    room: list[int] | None = None
    """Offset and size of the place in it for the result."""
    alike: Alike | None = field(default=None, compare=False, repr=False)
    """In the supervisor, where a request like this one may come again."""
    frames: Sequence[Buffer] = field(default=(), compare=False, repr=False)
    """With ``alike``: the arguments' bytes, in the order in which they came."""
    form: Form | None = field(default=None, compare=False, repr=False)
    """In a rank: that of the command's message."""

    def body(self) -> dict[str, Any]:
        """The fields that ranks get."""
        return {name: getattr(self, name) for name in _FORWARD}


_FORWARD = [each.name for each in fields(Forward) if each.compare]
"""The fields of a `Forward` that travel; the others are for the process that has it."""


@dataclass(frozen=True)
class MethodCall(Part):
    """What a model's network does outside of a forward, by ComfyUI's name of the method."""

    verb: ClassVar[str] = "call"
    model: str
    method: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Sample(Part):
    """The inputs of a sampling run."""

    model: str
    plan: Any
    sampler: str
    seed: int
    cfg: float
    noise: Tensor | list[Tensor]
    latent: Tensor | list[Tensor]
    sigmas: Tensor
    positive: dict[str, Any]
    negative: dict[str, Any] | None


@dataclass(frozen=True)
class SampleStep(Part):
    """One step of a sampling run; the first one has the inputs, and so has the first one on new ranks."""

    verb: ClassVar[str] = "sample"
    job: str
    step: int
    inputs: Sample | None = None
    record: list[Tensor] = field(default_factory=list)
    """For a run that begins again at a later step: what the forwards of all steps before have given."""

    def body(self) -> dict[str, Any]:
        """The fields, the inputs' among them."""
        inputs = self.inputs.body() if self.inputs is not None else {}
        return {"job": self.job, "step": self.step, "record": self.record, **inputs}

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> SampleStep:
        """The step that stands in a body."""
        inputs = Sample.read(body) if "noise" in body else None
        return cls(body["job"], body["step"], inputs, body["record"])


Command = Load | Unload | Evict | Forward | MethodCall | SampleStep
_COMMANDS: dict[str, type[Command]] = {
    each.verb: each for each in (Load, Unload, Evict, Forward, MethodCall, SampleStep)
}


@dataclass(frozen=True)
class Fault(Part):
    """A fault on purpose, for tests; the configuration's ``testing.faults`` explains the fields."""

    kind: str
    when: str
    rank: int | None
    block: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Envelope:
    """A command, and what goes with every command."""

    id: int
    command: Command
    store: list[Tensor] = field(default_factory=list)
    """Client tensors to keep, with their bytes; commands name them by digest."""
    forget: list[str] = field(default_factory=list)
    """Sampling runs to drop before the command."""
    evict: list[bytes] = field(default_factory=list)
    """Digests of kept tensors to drop after the command."""
    fault: Fault | None = None
    watched: bool = False
    """Whether the command's forwards are long, or may be: ranks tell how far they are, and stop at a block if asked."""
    mapped: list[int] | None = None
    """Id and size of a memory shared with a client, whose descriptor comes with the envelope."""
    unmapped: list[int] = field(default_factory=list)
    """Ids of such memories to drop before the command."""
    request: Tensor | None = None
    """The id of the client's request, of which rank 0 tells the client when it is completed; None if it doesn't. It
    travels as bytes, so that alike commands differ in bytes alone."""

    @property
    def is_plain(self) -> bool:
        """Whether it brings its command and nothing else."""
        return not (self.store or self.forget or self.evict or self.fault or self.mapped or self.unmapped)

    @property
    def request_id(self) -> int | None:
        """The id of that request."""
        if self.request is None:
            return None
        (packed,) = self.request.frames or ()
        (number,) = _REQUEST.unpack(packed)
        return int(number)

    def message(self) -> Message:
        """The envelope as a message."""
        fault = self.fault.body() if self.fault is not None else None
        envelope = {"store": self.store, "forget": self.forget, "evict": self.evict, "fault": fault}
        envelope |= {"watched": self.watched, "mapped": self.mapped, "unmapped": self.unmapped, "request": self.request}
        return Message(self.command.verb, {**self.command.body(), **envelope}, self.id)


def as_tensor(request: int) -> Tensor:
    """The id of a request as `Envelope.request` has it."""
    return Tensor("U8", (_REQUEST.size,), (_REQUEST.pack(request),))


def read_envelope(message: Message) -> Envelope:
    """The envelope that a message from the supervisor holds."""
    body = message.body
    fault = Fault.read(body["fault"]) if body["fault"] is not None else None
    command: Command
    if message.type == Forward.verb:
        command = Forward(**{name: body[name] for name in _FORWARD}, form=message.form)
    else:
        command = _COMMANDS[message.type].read(body)
    names = ("store", "forget", "evict", "watched", "mapped", "unmapped", "request")
    return Envelope(message.id, command, fault=fault, **{name: body[name] for name in names})


def with_tensors(command: Command, change: Callable[[Tensor], Tensor]) -> Command:
    """The command with ``change(tensor)`` in the place of each of its tensors."""
    return type(command).read(map_tensors(command.body(), change))


# --- up ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts(Part):
    """What ranks report about a loaded model."""

    family: str
    parameters: int
    weight_bytes: int
    """On the rank that holds most, without what it shares with its base."""
    dtype: str
    heads: int
    width: int
    sampling: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """The patches that were left out, and why."""
    quantization: dict[str, int] = field(default_factory=dict)
    """How many weights of the file are in which format (`Checkpoint.formats`); empty for plain ones."""
    weights: str = "replicated"
    """Where they lie: ``replicated``, ``sharded`` or ``host``."""
    resident_bytes: list[int] = field(default_factory=list)
    """On each rank's device, without what it shares with its base."""
    streamed_bytes: list[int] = field(default_factory=list)
    """What each rank fetches in a forward."""
    network: str = ""
    """In words, whose network it is and how it is shared out, if it is none of this version's families."""
    shares_tokens: bool = True
    """Whether an image's tokens are shared out."""
    fetch_s: list[float] = field(default_factory=list)
    """How long that takes each rank, at the speed of its links; empty if that wasn't measured."""
    shares: list[int] = field(default_factory=list)
    """How much of its forwards each rank takes; empty if all take the same."""
    shares_measured: bool = False
    """Whether that was measured."""
    rates: list[float] = field(default_factory=list)
    """The `DeviceRates` that plans of its forwards count with; empty if none were measured."""
    hosts: list[int] = field(default_factory=list)
    """The number of each rank's host; empty for one host."""


@dataclass(frozen=True)
class Loaded(Part):
    """The result of a load: the model and its base, which is the model itself if it has no patches."""

    model: Facts
    base: Facts

    def body(self) -> dict[str, Any]:
        """The facts as maps."""
        return {"model": self.model.body(), "base": self.base.body()}

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Loaded:
        """The result that stands in a body."""
        return cls(Facts.read(body["model"]), Facts.read(body["base"]))


@dataclass(frozen=True)
class Stepped(Part):
    """The result of a forward, a call or a step of a sampling run."""

    plan: str
    ranks: int
    forwards: int
    skipped: int
    """How many of these forwards the step cache mostly skipped."""
    prefix_hits: int = 0
    """How many of these forwards found their prefix computed (`tacod.rank.forward.prefixes`)."""
    prefix_misses: int = 0
    """For how many of these forwards a prefix was computed."""
    sigma: float | None = None
    """A sampling run's noise level after the step."""
    record: list[Tensor] = field(default_factory=list)
    """From rank 0, for a watched step of a sampling run: what its forwards have given, guidance included."""
    out: Tensor | list[Tensor] | None = None
    """From rank 0: the output, or one output for each of several latents; for a sampling run the latent, with the last
    step."""


Result = Loaded | Stepped | None
_RESULTS: dict[type[Command], type[Loaded | Stepped]] = {
    Load: Loaded,
    **dict.fromkeys((Forward, MethodCall, SampleStep), Stepped),
}


@dataclass(frozen=True)
class Ready(Part):
    """The rank has passed its self-test."""

    kind: ClassVar[str] = "ready"
    memory_used_bytes: int


@dataclass(frozen=True)
class Progress(Part):
    """How many bytes of how many a load has done."""

    kind: ClassVar[str] = "progress"
    done: int
    total: int


@dataclass(frozen=True)
class Begun(Part):
    """A further forward of the command begins; the first one is not reported."""

    kind: ClassVar[str] = "begun"


@dataclass(frozen=True)
class Done(Part):
    """The command is done."""

    kind: ClassVar[str] = "done"
    memory_used_bytes: int
    compute_s: float
    collective_s: float
    """Seconds of waiting for other ranks, in exchanges."""
    result: Result = None
    prefix_bytes: int = 0
    """Bytes of the prefixes that the rank keeps."""

    def body(self) -> dict[str, Any]:
        """The result's fields, and the numbers as bytes, so that reports of alike commands differ in bytes alone."""
        numbers = NUMBERS.pack(self.memory_used_bytes, self.compute_s, self.collective_s, self.prefix_bytes)
        result = self.result.body() if self.result is not None else {}
        return {"numbers": Tensor("U8", (NUMBERS.size,), (numbers,)), **result}

    @classmethod
    def read_for(cls, message: Message, kind: type[Loaded | Stepped] | None) -> Done:
        """The report in a message, with a result of this ``kind``."""
        (numbers,) = message.body["numbers"].frames
        memory_used_bytes, compute_s, collective_s, prefix_bytes = NUMBERS.unpack(numbers)
        form = message.form
        if kind is None or form is None:
            result = None if kind is None else kind.read(message.body)
        elif type(form.known) is kind:
            result = form.known
        else:
            result = kind.read(message.body)
            if len(message.frames) == 1:
                # Nothing of it comes in frames.
                form.known = result
        return cls(memory_used_bytes, compute_s, collective_s, result, prefix_bytes)


@dataclass(frozen=True)
class Failed(Part):
    """The command can't be done, for a reason that is the same on all ranks."""

    kind: ClassVar[str] = "failed"
    memory_used_bytes: int
    error: TacodError

    def body(self) -> dict[str, Any]:
        """The fields, the error as a map."""
        return {**super().body(), "error": self.error.to_wire()}

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Failed:
        """The failure that stands in a body."""
        return cls(body["memory_used_bytes"], TacodError.from_wire(body["error"]))


@dataclass(frozen=True)
class Raised(Part):
    """The rank met an unexpected error. It can go on if all ranks met the same one at the same place."""

    kind: ClassVar[str] = "raised"
    memory_used_bytes: int
    traceback: str
    what: str
    """The error's type and message."""
    place: str
    """The files and lines of the traceback."""
    exchanges: int
    """Exchanges with other ranks that the command had begun."""


@dataclass(frozen=True)
class Broken(Part):
    """The rank met an unexpected error, and ends."""

    kind: ClassVar[str] = "broken"
    traceback: str
    what: str = ""


Final = Done | Failed | Raised | Broken
"""The reports that end a command on one rank."""
Report = Ready | Progress | Begun | Final
_REPORTS: dict[str, type[Report]] = {each.kind: each for each in (Ready, Progress, Begun, Done, Failed, Raised, Broken)}


def report_message(report: Report, envelope: int = 0) -> Message:
    """A report as a message, about the envelope with this id."""
    return Message(report.kind, report.body(), envelope)


def pack_done(done: Done) -> bytes:
    """A report as one piece, which `read_done` reads. Its result has no tensors in frames."""
    _, header, numbers = wire.encode(report_message(done))
    return bytes(header) + bytes(numbers)


def read_done(packed: bytes, command: Command) -> Done:
    """The report that `pack_done` has packed, about this ``command``."""
    frames = [wire.PREAMBLE, packed[: -NUMBERS.size], packed[-NUMBERS.size :]]
    return Done.read_for(wire.decode(frames), _RESULTS[type(command)])


def read_report(message: Message, command: Command | None) -> Report:
    """The report in a rank's message about this ``command``. Raises `ProtocolError`."""
    if message.type not in _REPORTS:
        raise ProtocolError(f"unknown report {message.type!r:.40}")
    kind = _REPORTS[message.type]
    try:
        if kind is Done:
            return Done.read_for(message, _RESULTS.get(type(command)) if command is not None else None)
        return kind.read(message.body)
    except (KeyError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise ProtocolError(f"report {message.type!r} with wrong fields: {error}") from None
