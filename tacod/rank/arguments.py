"""A request's arguments: checked against a family's specs, and put on the device as `Inputs`."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch

from tacod.rank.families.control import Control
from tacod.rank.families.inputs import (
    Anything,
    Argument,
    Inputs,
    Number,
    Numbers,
    Places,
    Record,
    Residuals,
    Spec,
    Unread,
)
from tacod.rank.shared_memory import MappedMemory
from tacod_client import wire
from tacod_client.errors import ArgumentError
from tacod_client.tensors import from_wire

__all__ = ["Kept", "check_arguments", "check_names", "check_tokens", "digest", "is_fixed", "load_arguments"]


_FLOATS = {"F64", "F32", "F16", "BF16"}
SMALL_BYTES = 4096
SMALL_TENSORS = 256
"""Most small tensors that are kept: a pooled text, a guidance, a schedule's timesteps. The least recently used goes."""
HIDDEN = -1e4
"""Added to an attention score, it hides the key in any dtype."""
DEPTH = 8
"""Most lists and maps within each other."""
LOCKED_BYTES = 16 << 20
"""Arguments up to this size, above all a step's latents, reach a GPU through page-locked memory."""


class Kept:
    """Tensors on the device that forwards have in common, by digest and dtype.

    Large ones came with their digests, and stay until the supervisor has them dropped. Small ones travel with every
    forward; here the last ones are known by their contents.
    """

    def __init__(self) -> None:
        self._named: dict[tuple[bytes, torch.dtype | None], torch.Tensor] = {}
        self._small: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def find(self, tensor: wire.Tensor, dtype: torch.dtype | None, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor in this ``dtype``, or in the one that it came in; ``make`` puts it on the device if it isn't there.

        It is not to be changed.
        """
        if tensor.digest is not None:
            key = tensor.digest, dtype
            if key not in self._named:
                self._named[key] = make()
            return self._named[key]
        if tensor.nbytes > SMALL_BYTES:
            return make()
        small = tensor.dtype, tensor.shape, b"".join(tensor.frames or ()), dtype
        if small not in self._small:
            self._small[small] = make()
            if len(self._small) > SMALL_TENSORS:
                self._small.popitem(last=False)
        self._small.move_to_end(small)
        return self._small[small]

    def drop(self, digest: bytes) -> None:
        """Forget the tensors of this digest."""
        for key in [key for key in self._named if key[0] == digest]:
            del self._named[key]

    def clear(self) -> None:
        """Forget all of them."""
        self._named.clear()
        self._small.clear()


def check_arguments(given: Mapping[str, Any], specs: Mapping[str, Spec], family: str) -> None:
    """Check names, dtypes and shapes before any data is read; the order of the specs doesn't matter.

    Raises `ArgumentError`, naming the argument.
    """
    check_names(given, specs, family)
    sizes: dict[str, tuple[int, str]] = {}
    for name in sorted(specs, key=lambda name: _turn(name, specs[name])):
        value, spec = given.get(name), specs[name]
        if isinstance(spec, Unread):
            continue
        if value is None:
            if spec.required:
                raise ArgumentError(f"{name}: missing; {family} needs it, as {_wanted(spec)}", argument=name)
        elif isinstance(spec, Number):
            if not _is_within(value, spec):
                raise ArgumentError(f"{name}: expected {_wanted(spec)}, got {value!r:.40}", argument=name)
        elif isinstance(spec, Anything):
            _check_anything(name, value, spec)
        elif isinstance(spec, Numbers):
            _check_numbers(name, value, spec)
        elif isinstance(spec, Places):
            _check_places(name, value, spec, sizes)
        elif isinstance(spec, Residuals):
            _check_residuals(name, value, spec, sizes)
        elif isinstance(spec, Record):
            _check_record(name, value, spec, family)
        elif spec.shape is None:
            # A number is no choice, though 1 == True.
            if not any(type(each) is type(value) and each == value for each in (*spec.choices, *spec.also)):
                raise ArgumentError(
                    f"{name}: {value!r:.60} is none of {', '.join(map(repr, spec.choices))}", argument=name
                )
        elif spec.many:
            if not isinstance(value, list):
                raise ArgumentError(f"{name}: expected a list of tensors, got {_kind(value)}", argument=name)
            members = spec.members or [spec] * len(value)
            if not (spec.fewest or len(members)) <= len(value) <= len(members):
                raise ArgumentError(f"{name}: expected {_wanted(spec)}, got {len(value)} tensors", argument=name)
            for item, member in zip(value, members, strict=False):
                own = dict(sizes) if spec.others else _batch(sizes)
                _check_tensor(name, item, member, own)
                named = member.shape if spec.others else ("B",)
                sizes |= {size: known for size, known in own.items() if size in (named or ())}
        else:
            _check_tensor(name, value, spec, sizes)


def check_names(given: Iterable[str], specs: Mapping[str, Spec], family: str) -> None:
    """Raise `ArgumentError`, naming the argument, for one without a spec."""
    for name in given:
        if name not in specs:
            raise ArgumentError(
                f"{name}: {family} takes no such argument; it takes {', '.join(specs)}", argument=str(name)
            )


def _turn(name: str, spec: Spec) -> int:
    """The order of checks: the latent's sizes bind the other arguments, then those of required arguments do."""
    if name in ("x", "noise"):
        return 0
    return 1 if isinstance(spec, Argument) and spec.shape is not None and not (spec.many or spec.shared) else 2


def _batch(sizes: Mapping[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    return {"B": sizes["B"]} if "B" in sizes else {}


def _check_anything(name: str, value: Any, spec: Anything) -> None:
    tensors = value if isinstance(value, list) else [value]
    if spec.tensor and not (tensors and all(isinstance(each, wire.Tensor) and each.shape for each in tensors)):
        raise ArgumentError(f"{name}: expected {_wanted(spec)}; got {_kind(value)}", argument=name)
    batch = next((each.shape[0] for each in tensors if isinstance(each, wire.Tensor) and each.shape), 1)
    if spec.tensor and (not batch or any(each.shape[0] != batch for each in tensors)):
        raise ArgumentError(f"{name}: its tensors are for no one number of images", argument=name)
    if any(isinstance(each, wire.Tensor) and each.offset is not None for each in tensors):
        raise ArgumentError(
            f"{name}: a network that isn't ours may decide by its values, and ranks have to decide alike; send it as "
            "frames, as in shared memory it may change while they read it",
            argument="memory",
        )
    _check_plain(name, value, DEPTH)


def _check_plain(name: str, value: Any, depth: int) -> None:
    """Raise `ArgumentError` for what isn't made of tensors, numbers, strings, lists and maps, or is too deep."""
    if depth == 0:
        raise ArgumentError(f"{name}: lists and maps within each other, more than {DEPTH} deep", argument=name)
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                raise ArgumentError(f"{name}: expected a map by names, got the key {key!r:.40}", argument=name)
            _check_plain(f"{name}.{key:.40}", each, depth - 1)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _check_plain(f"{name}[{index}]", each, depth - 1)
    elif not (value is None or isinstance(value, bool | int | float | str | wire.Tensor)):
        raise ArgumentError(f"{name}: expected {_wanted(Anything())}; got {_kind(value)}", argument=name)


def _check_numbers(name: str, value: Any, spec: Numbers) -> None:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name}: expected {_wanted(spec)}; got {_kind(value)}", argument=name)
    for key, number in value.items():
        if key not in spec.names:
            raise ArgumentError(f"{name}.{key!s:.40}: no such number; expected {_wanted(spec)}", argument=name)
        if not _is_number(number) or not abs(number) < 1e6:
            raise ArgumentError(f"{name}.{key}: expected a number below a million, got {number!r:.40}", argument=name)


def _check_record(name: str, value: Any, spec: Record, family: str) -> None:
    if spec.many and not isinstance(value, list):
        raise ArgumentError(f"{name}: expected {_wanted(spec)}; got {_kind(value)}", argument=name)
    for index, record in enumerate(value if spec.many else [value]):
        where = f"{name}[{index}]" if spec.many else name
        if not isinstance(record, Mapping):
            raise ArgumentError(
                f"{where}: expected a map with any of {', '.join(spec.fields)}; got {_kind(record)}", argument=where
            )
        fields = {f"{where}.{field}": each for field, each in spec.fields.items()}
        check_arguments({f"{where}.{field!s:.40}": each for field, each in record.items()}, fields, family)


def _check_places(name: str, value: Any, spec: Places, sizes: Mapping[str, tuple[int, str]]) -> None:
    length, other = sizes[spec.length]
    fits = isinstance(value, list) and all(type(place) is int and 0 <= place <= length for place in value)
    if not fits or value != sorted(value):
        raise ArgumentError(
            f"{name}: expected {_wanted(spec)}, which is {length} by {other}; got {value!r:.60}", argument=name
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_within(value: Any, spec: Number) -> bool:
    if spec.many and not isinstance(value, list):
        return False
    return all(_is_number(each) and spec.least <= each <= spec.most for each in (value if spec.many else [value]))


def _check_residuals(name: str, value: Any, spec: Residuals, sizes: Mapping[str, tuple[int, str]]) -> None:
    if not isinstance(value, Mapping) or not isinstance(value.get("tensors"), list):
        raise ArgumentError(f"{name}: expected a map with a list of tensors, got {_kind(value)}", argument=name)
    for key, places in value.items():
        if not isinstance(places, list):
            raise ArgumentError(f"{name}.{key!s:.40}: expected a list, got {_kind(places)}", argument=name)
        if key == "tensors":
            continue
        if key not in spec.blocks and any(place is not None for place in places):
            raise ArgumentError(
                f"{name}.{key!s:.40}: this model takes residuals for {', '.join(spec.blocks)}", argument=name
            )
        if any(
            place is not None and (type(place) is not int or not 0 <= place < len(value["tensors"])) for place in places
        ):
            raise ArgumentError(f"{name}.{key!s:.40}: expected indexes of its tensors, or nil", argument=name)
    fitting = Argument(("B", "N", spec.width), shared=True)
    for where, tensor in _residuals(name, value):
        _check_tensor(where, tensor, fitting, _batch(sizes))


def _residuals(name: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each tensor, by the first place that names it."""
    for index, tensor in enumerate(value["tensors"]):
        places = (
            f"{name}.{key}[{each.index(index)}]" for key, each in value.items() if key != "tensors" and index in each
        )
        yield next(places, f"{name}.tensors[{index}]"), tensor


def check_tokens(given: Mapping[str, Any], specs: Mapping[str, Spec], tokens: int) -> None:
    """Check that residuals fit an image with this many tokens. Raises `ArgumentError`, naming the residual."""
    for name, spec in specs.items():
        if isinstance(spec, Residuals) and given.get(name) is not None:
            for where, tensor in _residuals(name, given[name]):
                n = tensor.shape[1]
                if n > tokens or (spec.whole and n < tokens):
                    raise ArgumentError(f"{where}: it is for {n} tokens, but the image has {tokens}", argument=where)


def _check_tensor(name: str, value: Any, spec: Argument, sizes: dict[str, tuple[int, str]]) -> None:
    assert spec.shape is not None
    if not isinstance(value, wire.Tensor):
        raise ArgumentError(f"{name}: expected a tensor, {_wanted(spec)}; got {_kind(value)}", argument=name)
    if spec.rows and value.dtype in _FLOATS:
        raise ArgumentError(f"{name}: expected a tensor of whole numbers, got {value.dtype}", argument=name)
    if value.dtype not in _FLOATS and not (spec.mask and value.dtype == "BOOL") and not (spec.keys or spec.rows):
        raise ArgumentError(f"{name}: expected a floating-point tensor, got {value.dtype}", argument=name)
    shape = spec.shape_for(len(value.shape))
    assert shape is not None
    fits = len(value.shape) == len(shape)
    if value.shape and value.shape[-1] in spec.widths:
        shape = (*shape[:-1], value.shape[-1])
    for size, wanted in zip(value.shape, shape, strict=False):
        fits = fits and size > 0 and (isinstance(wanted, str) or size == wanted)
    if not fits:
        raise ArgumentError(f"{name}: expected {_wanted(spec)}, got shape {list(value.shape)}", argument=name)
    for size, symbol in zip(value.shape, shape, strict=True):
        if symbol == "B" and spec.shared and size == 1:
            continue
        if isinstance(symbol, str) and "*" in symbol:
            _check_product(name, size, symbol, sizes)
        elif isinstance(symbol, str):
            known, other = sizes.setdefault(symbol, (size, name))
            if size != known:
                reason = f"its {symbol} is {size}, but that of {other} is {known}; they must agree"
                if symbol == "B" and spec.shared:
                    reason = f"it is for {size} images, but {other} has {known} images; make it {known}, or 1 for all"
                raise ArgumentError(f"{name}: {reason}", argument=name)


def _check_product(name: str, size: int, symbol: str, sizes: dict[str, tuple[int, str]]) -> None:
    """A size that is the product of others; at most one of these isn't known yet."""
    factors = symbol.split("*")
    known = [sizes[factor][0] for factor in factors if factor in sizes]
    unknown = [factor for factor in factors if factor not in sizes]
    product = math.prod(known)
    if size % product or (not unknown and size != product):
        wanted = f"{'a multiple of ' if unknown else ''}{product}, which is {' * '.join(map(str, known))}"
        raise ArgumentError(f"{name}: its {symbol} is {size}; expected {wanted}", argument=name)
    for factor in unknown:
        sizes[factor] = size // product, name


def _wanted(spec: Spec) -> str:
    if isinstance(spec, Anything):
        return (
            "a tensor or a list of tensors" if spec.tensor else "a tensor, number or string, or lists or maps of these"
        )
    if isinstance(spec, Number):
        kind = "a list of numbers" if spec.many else "a number"
        return f"{kind} from {spec.least:g} to {spec.most:g}"
    if isinstance(spec, Numbers):
        return f"a map of numbers, with any of {', '.join(spec.names)}"
    if isinstance(spec, Record):
        return f"{'a list of maps' if spec.many else 'a map'} with any of {', '.join(spec.fields)}"
    if isinstance(spec, Places):
        return f"a list of whole numbers that don't fall, from 0 to {spec.length}"
    if isinstance(spec, Residuals):
        return f"a map of residuals for {', '.join(spec.blocks)}"
    if isinstance(spec, Unread):
        return "anything"
    if spec.shape is None:
        return "one of " + ", ".join(map(repr, spec.choices))
    if spec.members is not None:
        many = f"{spec.fewest} to {len(spec.members)}" if spec.fewest else str(len(spec.members))
        return f"a list of {many} tensors of shapes " + ", ".join(map(_shapes, spec.members))
    shape = f"shape {_shapes(spec)}"
    return f"a list of tensors of {shape}" if spec.many else shape


def _shapes(spec: Argument) -> str:
    """The shape that a tensor may have, or both."""
    shapes = dict.fromkeys((spec.shape or (), spec.longer))
    widths = [f"of {width} channels" for width in spec.widths]
    return " or ".join([*(f"[{', '.join(map(str, shape))}]" for shape in shapes), *widths])


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, wire.Tensor) else type(value).__name__


def load_arguments(
    given: Mapping[str, Any],
    specs: Mapping[str, Spec],
    dtype: torch.dtype,
    device: torch.device,
    kept: Kept | None = None,
    memory: MappedMemory | None = None,
) -> Inputs:
    """The arguments as torch values on ``device``; those with an offset lie in ``memory``.

    Tensors are in the compute dtype, or in fp32 where the spec says so. Residuals stay in the host's memory, because a
    rank needs only some of their tokens. Those that ``kept`` knows are not put on the device again: conditioning, and
    the timesteps of a schedule, which the next run has too.
    """
    first = given.get("x")
    latents = first[0].dtype if isinstance(first, list) and first else getattr(first, "dtype", "")

    def put_anything(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(put_anything, value))
        if isinstance(value, Mapping):
            return {name: put_anything(each) for name, each in value.items()}
        if not isinstance(value, wire.Tensor):
            return value
        chosen = dtype if value.dtype == latents else None
        if kept is None or value.digest is None:
            return _as_it_is(value, chosen, device)
        # Its network may write to what it is given.
        return kept.find(value, chosen, lambda: _as_it_is(value, chosen, device)).clone()

    def put(name: str, value: Any, spec: Spec) -> Any:
        if isinstance(spec, Anything):
            return put_anything(value)
        if isinstance(spec, Residuals):
            return _control(value)
        if isinstance(value, list):
            return [put(name, item, spec) for item in value]
        if isinstance(spec, Record):
            return put_all(value, spec.fields, f"{name}.")
        if not isinstance(value, wire.Tensor):
            return spec.also.get(value, value) if isinstance(spec, Argument) else value
        if isinstance(spec, Argument) and spec.keys:
            return _key_mask(name, value, device)
        if isinstance(spec, Argument) and spec.rows:
            return _row_numbers(name, value, spec.rows, device)
        chosen = torch.float32 if isinstance(spec, Argument) and spec.fp32 else dtype
        if value.offset is not None:
            assert memory is not None
            return memory.read(value, chosen)
        # The same latents don't come again.
        if kept is None or name == "x":
            return _on_device(value, chosen, device)
        return kept.find(value, chosen, lambda: _on_device(value, chosen, device))

    def put_all(values: Mapping[str, Any], specs: Mapping[str, Spec], path: str = "") -> dict[str, Any]:
        read = {name: value for name, value in values.items() if not isinstance(specs[name], Unread)}
        return {name: put(path + name, value, specs[name]) for name, value in read.items() if value is not None}

    return Inputs(put_all(given, specs), specs)


def is_fixed(name: str, value: Any, spec: Spec) -> bool:
    """Whether an argument is the same on the device for all forwards whose messages differ in tensors' bytes alone.

    A network that isn't ours may write to what it is given.
    """
    if name in wire.CHANGING or isinstance(spec, Anything | Residuals):
        return False
    if isinstance(value, Mapping):
        return all(is_fixed(key, each, spec) for key, each in value.items())
    if isinstance(value, list):
        return all(is_fixed("", each, spec) for each in value)
    return not isinstance(value, wire.Tensor) or value.digest is not None


def digest(value: Any) -> Hashable:
    """A digest of an argument's contents, to tell runs apart; most tensors came with theirs."""
    if isinstance(value, wire.Tensor):
        return value.with_digest().digest
    if isinstance(value, Mapping):
        return tuple(sorted((name, digest(item)) for name, item in value.items()))
    return tuple(map(digest, value)) if isinstance(value, list) else value


def _key_mask(name: str, value: wire.Tensor, device: torch.device) -> torch.Tensor:
    """Which tokens count, boolean: integers other than 0, and floats equal to 0, because these are added to scores."""
    mask: torch.Tensor = from_wire(value, "torch")
    if not mask.is_floating_point():
        return (mask != 0).to(device)
    counts = mask == 0
    if not (counts | (mask <= HIDDEN)).all():
        raise ArgumentError(
            f"{name}: floats are added to scores: 0 where a token counts, {HIDDEN:g} or less where it is hidden; "
            "give integers or booleans for 0 and 1",
            argument=name,
        )
    return counts.to(device)


def _row_numbers(name: str, value: wire.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    """Row numbers of a table, int64."""
    numbers: torch.Tensor = from_wire(value, "torch").long()
    if not ((numbers >= 0) & (numbers < rows)).all():
        raise ArgumentError(f"{name}: expected whole numbers from 0 to {rows - 1}", argument=name)
    return numbers.to(device)


def _on_device(value: wire.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # From locked memory it goes by itself, and PyTorch keeps that until it has gone, and for the next one.
    locked = device.type == "cuda" and value.dtype != "BOOL" and value.nbytes <= LOCKED_BYTES
    tensor: torch.Tensor = from_wire(value, "torch", locked)
    if tensor.dtype == torch.bool:
        tensor = torch.zeros(tensor.shape, dtype=dtype).masked_fill(~tensor, -math.inf)
    return tensor.to(device, non_blocking=locked).to(dtype)


def _as_it_is(value: wire.Tensor, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """A tensor of its own, in this dtype or in the one that it came in."""
    tensor: torch.Tensor = from_wire(value, "torch")
    return tensor.to(device, dtype, copy=True)


def _control(value: Mapping[str, Any]) -> Control:
    tensors = value["tensors"]
    places = {name: each for name, each in value.items() if name != "tensors"}
    return Control(
        {name: [None if place is None else tensors[place] for place in each] for name, each in places.items()}
    )
