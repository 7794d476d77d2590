"""For the tests of every family: its tiny model, and every argument that it takes, made from its spec."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tacod.rank.families import families
from tacod.rank.families.base import DiT
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Argument, Inputs, Number, Numbers, Places, Record, Residuals, Spec, Unread
from tacod.rank.forward.warmup import random_inputs
from tacod_client.errors import ArgumentError
from tacod_client.tensors import to_wire

CPU = torch.device("cpu")
FAMILIES = {family.family: family for family in families()}
_DRAWS = 999
_SWITCHES = ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn", "stg_self_attn_blocks")
NOT_DRAWN = ("guide_attention_entries", "generated_keyframes", *_SWITCHES)
"""Optional arguments whose numbers follow from others' sizes, or that leave parts out: a family's own tests have them.
"""
_MANY = 100
_LARGEST_FACTOR = 64
"""By how much the sides of a latent are multiplied at the most."""


@functools.cache
def tiny(name: str) -> DiT:
    """The tiny model of a family, with the same random weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[name](FAMILIES[name].tiny).eval().requires_grad_(False)


def required_inputs(dit: DiT, batch: int = 1, text: int = 5, sides: Sequence[int] = (1, 17), seed: int = 0) -> Inputs:
    """What a forward can't be without.

    ``sides`` are multiplied by the smallest number that makes a latent of a size that the model takes; sides that come
    before them, such as a video's frames, are 3.
    """
    free = [side for side in dit.canvas[2:] if isinstance(side, str)]
    drawn = [3] * (len(free) - len(sides)) + list(sides)
    for factor in range(1, _LARGEST_FACTOR):
        sizes = {**dict.fromkeys(dit.usual, text), "B": batch}
        sizes |= {side: factor * size for side, size in zip(free, drawn, strict=True)}
        inputs = random_inputs(dit, CPU, torch.Generator().manual_seed(seed), sizes)
        try:
            dit.lengths(inputs)
        except ArgumentError:
            continue
        return inputs
    raise AssertionError(f"{dit.family} takes no latents of {sides}, however often")


def each_latent(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs with every noisy latent changed."""
    x = inputs["x"]
    return inputs.replace(x=list(map(change, x)) if isinstance(x, list) else change(x))


def at_level(dit: DiT, inputs: Inputs, level: float) -> Inputs:
    """The same inputs at this noise level."""
    times = [dit.timestep(torch.full(each.shape, level)).float() for each in inputs.timesteps]
    return inputs.replace(timestep=times if isinstance(inputs["timestep"], list) else times[0])


def smallest_inputs(dit: DiT, batch: int, text: int) -> Inputs:
    """As `required_inputs`, with few tokens that two ranks share unevenly."""
    inputs = required_inputs(dit, batch, text, (1, 3))
    # Of latents whose sides must add up to some length, PixArt's, the long ones have few tokens.
    return inputs if sum(dit.lengths(inputs)) < _MANY else required_inputs(dit, batch, text, (1, 33))


def with_optional(
    dit: DiT, inputs: Inputs, names: Sequence[str] | None = None, seed: int = 0, shared: bool = True, most: int = 7
) -> Inputs:
    """The same inputs with these optional arguments, or with all.

    ``shared`` ones are of a batch of 1 where they may be; what has sizes of its own has them up to ``most``.
    """
    generator = torch.Generator().manual_seed(seed)
    specs = {name: spec for name, spec in dit.arguments().items() if name not in NOT_DRAWN}
    optional = [name for name, spec in specs.items() if not spec.required and name not in inputs]
    chosen = [name for name in optional if names is None or name in names]
    # Masks and residuals have as many tokens as everything else makes.
    for name in sorted(chosen, key=lambda name: _turn(dit.arguments()[name])):
        inputs = _with(dit, name, inputs, generator, shared, most)
    return inputs


def _with(dit: DiT, name: str, inputs: Inputs, generator: torch.Generator, shared: bool, most: int) -> Inputs:
    """One more argument, drawn until it has sizes that the model takes."""
    spec = dit.arguments()[name]

    def accepts(value: Any) -> bool:
        with suppress(ArgumentError):
            dit.lengths(inputs.replace(**{name: value}))
            return True
        return False

    for _ in range(_DRAWS):
        if isinstance(spec, Record):
            value = _record(spec, lambda field: _value(dit, field, inputs, generator, shared, most), accepts, generator)
        else:
            value = _value(dit, spec, inputs, generator, shared, most)
        if isinstance(value, Tensor) and name in dit.usual_values:
            value = torch.full_like(value, dit.usual_values[name])
        if accepts(value):
            return inputs.replace(**{name: value})
    raise AssertionError(f"{dit.family} takes no {name}, however often it is drawn")


def _record(
    spec: Record, draw: Callable[[Spec], Any], accepts: Callable[[Any], bool], generator: torch.Generator
) -> Any:
    """Some fields, drawn until they are accepted; of a list of such maps one."""
    for _ in range(_DRAWS):
        made: dict[str, Any] = {}
        for name, field in spec.fields.items():
            left_out = not field.required and bool(torch.randint(2, (), generator=generator))
            if left_out or isinstance(field, Unread):
                continue
            if isinstance(field, Record):
                made[name] = _record(field, draw, lambda value, name=name: accepts({name: value}), generator)
            else:
                made[name] = draw(field)
        value = [made] if spec.many else made
        if accepts(value):
            return value
    raise AssertionError(f"a map with some of {', '.join(spec.fields)} isn't taken, however often it is drawn")


def random_case(
    dit: DiT, seed: int, batch: int, text: int, sides: Sequence[int], optional: Sequence[str], shared: bool
) -> Inputs:
    """Inputs as a test draws them; ``optional`` names arguments."""
    inputs = required_inputs(dit, batch, text, sides, seed)
    return dit.prepare(with_optional(dit, inputs, optional, seed, shared))


def _turn(spec: Spec) -> int:
    if isinstance(spec, Residuals):
        return 2
    return 1 if isinstance(spec, Argument) and spec.mask else 0


def _value(dit: DiT, spec: Spec, inputs: Inputs, generator: torch.Generator, shared: bool, most: int) -> Any:
    def integer(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    if isinstance(spec, Number):
        number = spec.least + (spec.most - spec.least) * integer(9) / 10
        return [number, spec.least] if spec.many else number
    if isinstance(spec, Numbers):
        return {name: integer(20) / 10 for name in spec.names}
    if isinstance(spec, Residuals):
        return _residuals(dit, spec, inputs, generator, shared)
    if isinstance(spec, Places):
        length = _sizes(dit, inputs)[spec.length]
        return sorted(integer(length + 1) - 1 for _ in range(2))
    if isinstance(spec, Unread):
        return None
    if spec.shape is None:
        return spec.choices[integer(len(spec.choices)) - 1]

    def tensor() -> Tensor:
        assert spec.shape is not None
        known = _sizes(dit, inputs)
        if spec.mask:
            known |= {size: sum(dit.lengths(inputs)) for size in spec.shape if size not in known}
        if spec.shared and shared:
            known["B"] = 1
        named = [size for size in spec.shape if isinstance(size, str)]
        own = {part: integer(most) for size in named for part in size.split("*")} | known
        shape = [
            math.prod(own[part] for part in size.split("*")) if isinstance(size, str) else size for size in spec.shape
        ]
        if spec.keys:
            seen = torch.rand(shape, generator=generator) < 0.6
            seen[..., 0] = True
            return seen
        if spec.rows:
            return torch.randint(spec.rows, shape, generator=generator)
        values = torch.randn(shape, generator=generator)
        if spec.mask:
            # Of most other ranks' tokens a query sees none, but each sees itself.
            values.masked_fill_(torch.rand(shape, generator=generator) < 0.7, -torch.inf)
            values.diagonal(dim1=-2, dim2=-1).fill_(0.0)
        return values

    return [tensor() for _ in range(2)] if spec.many else tensor()


def _residuals(dit: DiT, spec: Residuals, inputs: Inputs, generator: torch.Generator, shared: bool) -> Control:
    """For every other block, of all of the image's tokens or of the first ones."""
    tokens = dit.lengths(inputs)[-1]
    n = tokens if spec.whole else max(tokens * 2 // 3, 1)
    batch = 1 if shared else inputs.batch
    residual = to_wire(torch.randn(batch, n, spec.width, generator=generator), "control")
    return Control({kind: [residual, None] * (blocks // 2 + 1) for kind, blocks in spec.blocks.items()})


def _sizes(dit: DiT, inputs: Inputs) -> dict[Any, int]:
    """The free sizes of what is there, by their names."""
    sizes: dict[Any, int] = {}
    for name, spec in dit.arguments().items():
        value = inputs.get(name)
        if isinstance(spec, Argument) and spec.shape is not None and isinstance(value, Tensor):
            sizes |= dict(zip(spec.shape, value.shape, strict=True))
        elif isinstance(spec, Argument) and spec.members is not None and value is not None:
            for member, each in zip(spec.members, value, strict=True):
                sizes |= dict(zip(member.shape or (), each.shape, strict=True))
    return {**sizes, "B": inputs.batch}


def sent(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same as a client sends it."""

    def packed(value: Any) -> Any:
        if isinstance(value, Control):
            rows = {kind: [None if each is None else 0 for each in row] for kind, row in value.residuals.items()}
            return {**rows, "tensors": [each for each in next(iter(value.residuals.values())) if each is not None][:1]}
        if isinstance(value, list):
            return list(map(packed, value))
        if isinstance(value, Mapping):
            return {name: packed(each) for name, each in value.items()}
        return to_wire(value, "argument") if isinstance(value, Tensor) else value

    return {name: packed(value) for name, value in inputs.items()}
