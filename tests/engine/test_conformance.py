"""What is asked of every family, of each that `families` finds, on its tiny model: its forwards.

test_conformance_names.py has the names of its weights.

A family's own tests hold it to its authors' numbers, and to what it alone does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance import CPU, FAMILIES, NOT_DRAWN, at_level, each_latent, required_inputs, sent, tiny, with_optional
from helpers import FP32, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_worker import LAYOUTS, WORLD, Ranks, unequal
from torch import Tensor, nn

from tacod.plan import Layout, Plan, Request, Shape
from tacod.rank.arguments import check_arguments, check_tokens, load_arguments
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.inputs import Argument, Inputs, Number, Numbers, Places, Record, Residuals, Spec, Unread
from tacod.rank.forward import graphs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, equal, plan_for, relative_difference
from tacod.rank.forward.run import run as run_call
from tacod.rank.forward.step_cache import MOST_IN_A_ROW
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.fp8 import quantize_blocks
from tacod.rank.weights.load import share
from tacod_client import wire
from tacod_client.errors import ArgumentError
from tacod_client.tensors import from_wire, to_wire

FAMILY = pytest.mark.parametrize("family", FAMILIES)
ARGUMENT = pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in FAMILIES
        for name, spec in tiny(family).arguments().items()
        if not isinstance(spec, Unread) and name not in NOT_DRAWN
    ],
)
BATCH = 3
HOLDS_ALL = {
    "chroma_radiance": "patches of pixels that overlap are added up",
    "pixart": "a convolution of all patches differs in bits from a linear layer of some",
    "sd3": "as PixArt's",
}
"""Families of images whose ranks have more of the whole sequence than latents, and why."""
_SQUARE = ("sd3",)
"""Families whose table of positions is as large as its sides."""


def forward(dit: DiT, inputs: Mapping[str, Any]) -> Output:
    """On one rank."""
    with torch.inference_mode():
        return dit.run(SequenceParallel(), Inputs(inputs, dit.arguments()))


def tensors(out: Output) -> list[Tensor]:
    """The output, or each of several."""
    return out if isinstance(out, list) else [out]


def everything(dit: DiT, batch: int = BATCH) -> Inputs:
    """Every argument."""
    return with_optional(dit, required_inputs(dit, batch))


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@FAMILY
@settings(max_examples=2)  # in each of 16 layouts
@given(data=st.data())
def test_every_layout_equals_one_rank(ranks: Ranks, family: str, layout: tuple[int, ...], data: st.DataObject) -> None:
    check_layout(ranks, family, layout, data)


@FAMILY
@settings(max_examples=6)
@given(layout=unequal(LAYOUTS), data=st.data())
def test_unequal_shares_equal_one_rank(ranks: Ranks, family: str, layout: tuple[Any, ...], data: st.DataObject) -> None:
    check_layout(ranks, family, layout, data)


def check_layout(ranks: Ranks, family: str, layout: tuple[Any, ...], data: st.DataObject) -> None:
    """Any inputs give the same as on one rank."""
    optional = [name for name, spec in tiny(family).arguments().items() if not spec.required]
    errors = ranks.run(
        layout,
        "forward",
        family=family,
        batch=layout[0] + data.draw(st.integers(0, 2), "more images"),
        text=data.draw(st.integers(1, 9), "text"),
        sides=data.draw(st.tuples(*[st.integers(1, 13)] * 2), "sides"),
        optional=data.draw(st.lists(st.sampled_from(optional), unique=True) if optional else st.just([]), "optional"),
        shared=data.draw(st.booleans(), "a batch of 1 where it may be"),
        sharing=data.draw(st.booleans(), "ranks write into each other's memory"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    assert len(errors) == WORLD, "an idle rank gets the output too"
    assert max(errors) <= FP32


@pytest.mark.parametrize(
    ("everything", "layout"), [(False, (1, 1, 5)), (True, (1, 5, 1))], ids=["required", "everything"]
)
@FAMILY
def test_no_rank_has_the_whole_sequence(ranks: Ranks, family: str, everything: bool, layout: tuple[int, ...]) -> None:
    """But for latents and places, and within attention. A mask of all pairs of tokens is the client's."""
    specs = tiny(family).arguments()
    optional = [name for name, spec in specs.items() if not spec.required and not getattr(spec, "mask", False)]
    sides = (14, 26) if family in _SQUARE else (4, 332)
    case = {"batch": 1, "text": 9, "sides": sides, "optional": optional * everything, "shared": False, "seed": 0}
    found = {what for each in ranks.run(layout, "whole", family=family, **case) for what in each}
    assert bool(found) == (family in HOLDS_ALL), found


@FAMILY
def test_kernels_equal_plain_operations(ranks: Ranks, family: str) -> None:
    """In Triton's interpreter, a whole forward on two ranks; test_kernels.py has the kernels by themselves."""
    layout = (1, 2, 1)
    told = ranks.run(layout, "kernels", family=family)
    assert max(error for error, _ in told) <= FP32
    assert [called > 0 for _, called in told] == [rank == 1 for rank in range(WORLD)]


SKIPPING = [(1, 1, 3), (2, 2, 1), (2, 1, 1, (0, 2, 0, 1, 0))]
"""Layouts for a step cache; what they change of it is the engine's, so that families have one each, by turns."""


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (family, layout)
        for place, family in enumerate(FAMILIES)
        for layout in (SKIPPING if family in ("flux", "ltxav") else SKIPPING[place % 3 :][:1])
    ],
    ids=str,
)
def test_all_ranks_skip_the_same_steps(ranks: Ranks, family: str, layout: tuple[Any, ...]) -> None:
    """Each group of the batch as one process does with its images; what is left idle gets the result too."""
    told = ranks.run(layout, "steps", family=family)
    assert len(told) == WORLD
    assert max(error for _, error, _ in told) <= FP32
    skipped, _, alone = told[0]
    # A group that skips waits for those that don't: what all skip is counted.
    assert skipped == [all(each) for each in zip(*alone, strict=True)]
    assert all({True, False} == set(group) for group in alone)
    assert all(each[0] == skipped for each in told)


# --- arguments --------------------------------------------------------------------------------------------------------


def serve(dit: DiT, given: Mapping[str, Any]) -> Output:
    """A forward of arguments as a client sends them, checked as the ranks do it."""
    specs = dit.arguments()
    check_arguments(given, specs, dit.family)
    inputs = load_arguments(given, specs, torch.float32, CPU)
    check_tokens(given, specs, dit.lengths(inputs)[-1])
    return forward(dit, dit.prepare(inputs))


def refused(dit: DiT, given: Mapping[str, Any], name: str) -> None:
    """By the argument's name, or by the place in it."""
    with pytest.raises(ArgumentError, match=f"^{name}") as caught:
        serve(dit, given)
    assert str(caught.value.argument).split(".")[0] == name


@ARGUMENT
def test_an_argument_that_is_left_out(family: str, name: str) -> None:
    dit = tiny(family)
    specs = dit.arguments()
    if specs[name].required:
        given = sent(everything(dit))
        del given[name]
        refused(dit, given, name)
        return
    others = [each for each, spec in specs.items() if each != name and not spec.required]
    inputs = with_optional(dit, required_inputs(dit, BATCH), others)
    assert name not in inputs
    out = serve(dit, sent(inputs))
    shapes = dit.output_shapes([tuple(each.shape) for each in inputs.latents])
    assert [tuple(each.shape) for each in tensors(out)] == shapes
    assert all(each.isfinite().all() for each in tensors(out))


def wrong(spec: Spec, value: Any) -> list[Any]:
    """What can't be instead of ``value``."""
    if isinstance(spec, Number):
        numbers = [spec.most + 1, spec.least - 1, float("nan"), "1", True]
        return [*([each] for each in numbers), 1] if spec.many else numbers
    if isinstance(spec, Numbers):
        return [list(value.values()), {"nothing": 1.0}, {spec.names[0]: "1"}, {spec.names[0]: float("inf")}]
    if isinstance(spec, Places):
        return [3, "1", [-1], [0.5], [True], [1, 0], [0, 999]]
    if isinstance(spec, Record):
        if spec.many:
            return [value[0], [3], *([each] for each in wrong(replace(spec, many=False), value[0]))]
        lacking = [{key: each for key, each in value.items() if key != name} for name in value]
        return [
            3,
            {**value, "nothing": 1.0},
            *(each for name, each in zip(value, lacking, strict=True) if spec.fields[name].required),
            *({**value, name: bad} for name, each in value.items() for bad in wrong(spec.fields[name], each)),
        ]
    if isinstance(spec, Residuals):
        batch, n, width = value["tensors"][0].shape
        shapes = (batch, n, width + 1), (batch, n), (batch + 1, n, width), (batch, 999, width)
        return [3, {"nothing": [0], "tensors": value["tensors"]}] + [
            {**value, "tensors": [wire.Tensor("F32", shape, None)]} for shape in shapes
        ]
    if spec.shape is None:
        return ["nothing"]
    if spec.members is not None:
        return [
            value[0],
            *(
                [*value[:at], each, *value[at + 1 :]]
                for at, one in enumerate(spec.members)
                for each in wrong(one, value[at])
            ),
        ]
    if spec.many:
        one = replace(spec, many=False)
        return [value[0], *([value[0], each] for each in wrong(one, value[0]))]
    shapes = [(*value.shape, 1), value.shape[1:]]
    for at, size in enumerate(spec.shape):
        other = 0 if isinstance(size, str) else size + 1
        shapes.append((*value.shape[:at], other, *value.shape[at + 1 :]))
    dtypes = [] if spec.keys else ["F32"] if spec.rows else ["I64"]
    return ["nothing", *(wire.Tensor(value.dtype, shape, None) for shape in shapes)] + [
        wire.Tensor(dtype, value.shape, None) for dtype in dtypes
    ]


@ARGUMENT
def test_a_wrong_argument_is_refused_by_its_name(family: str, name: str) -> None:
    dit = tiny(family)
    given = sent(everything(dit))
    for value in wrong(dit.arguments()[name], given[name]):
        refused(dit, {**given, name: value}, name)


@FAMILY
def test_what_the_network_does_not_read_changes_nothing(family: str) -> None:
    dit = tiny(family)
    given = sent(everything(dit))
    expected = serve(dit, given)
    for name, spec in dit.arguments().items():
        if isinstance(spec, Unread):
            for value in (1, "x", [given["x"]], given["x"], {"a": None}):
                assert equal(serve(dit, {**given, name: value}), expected)


@FAMILY
def test_an_argument_of_no_such_name_is_refused(family: str) -> None:
    refused(tiny(family), {**sent(everything(tiny(family))), "nothing": 1.0}, "nothing")


def has_batch(spec: Spec) -> bool:
    return isinstance(spec, Residuals) or (isinstance(spec, Argument) and spec.batch_axis is not None)


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in FAMILIES for name, spec in tiny(family).arguments().items() if has_batch(spec)],
)
def test_a_batch_of_1_among_larger_ones(family: str, name: str) -> None:
    dit = tiny(family)
    spec = dit.arguments()[name]
    several = with_optional(dit, required_inputs(dit, BATCH), shared=False)
    if isinstance(spec, Residuals):
        given = sent(several)
        values = from_wire(given[name]["tensors"][0], "torch")[:1]
        tensors = [to_wire(each, name) for each in (values, values.repeat(BATCH, 1, 1))]
        outs = [serve(dit, {**given, name: {**given[name], "tensors": [each]}}) for each in tensors]
        assert relative_error(*outs) <= FP32
        return
    assert isinstance(spec, Argument)
    if not spec.shared:
        given = {**sent(several), name: sent(with_optional(dit, required_inputs(dit, 1)))[name]}
        if name == "x":
            # It is what the others are held to.
            with pytest.raises(ArgumentError, match="its B is 3"):
                serve(dit, given)
            return
        refused(dit, given, name)
        return
    axis = spec.batch_axis
    assert axis is not None
    alone = several[name].narrow(axis, 0, 1)
    repeated = alone.repeat([BATCH if at == axis else 1 for at in range(alone.ndim)])
    outs = [serve(dit, sent(several.replace(**{name: each}))) for each in (alone, repeated)]
    assert relative_error(*outs) <= FP32


@FAMILY
def test_a_forward_writes_to_none_of_its_inputs(family: str) -> None:
    """Later forwards have the same tensors."""
    dit = tiny(family)
    given = everything(dit)
    before = given.clone()
    forward(dit, dit.prepare(given))
    assert all(torch.equal(*each) for each in zip(given.tensors, before.tensors, strict=True))


# --- graphs -----------------------------------------------------------------------------------------------------------


class FakeGraph:
    """What stands for a captured forward: it runs again, on the inputs that it was captured with."""

    fault = ""

    def __init__(self, call: Call, topology: Topology, pool: Any) -> None:
        self._call, self._topology = replace(call, inputs=call.inputs.map(torch.clone)), topology
        self.most_bytes = self.prefix_bytes = 0

    def replay(self, call: Call) -> Any:
        self._call.inputs.copy_(call.inputs)
        return run_call(replace(self._call, prefix=call.prefix), self._topology)


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)


@FAMILY
def test_like_inputs_are_replayed_and_unlike_ones_are_not(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = tiny(family)
    ran: list[str] = []

    def run(call: Call, topology: Topology, *rest: Any, **more: Any) -> Any:
        ran.append("run")
        return run_call(call, topology, *rest, **more)

    monkeypatch.setattr(graphs, "run", run)
    monkeypatch.setattr(graphs, "Graph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    # Latents look as if they were on a GPU; what is computed from them doesn't.
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: getattr(self, "on_gpu", False)))
    residuals = [name for name, spec in dit.arguments().items() if isinstance(spec, Residuals)]
    optional = [name for name in dit.arguments() if name not in residuals]

    def inputs(batch: int, seed: int) -> Inputs:
        found = with_optional(dit, required_inputs(dit, batch, seed=seed), optional, seed=1)
        noise = torch.Generator().manual_seed(seed)
        found = found.map(lambda each: _moved(each, noise))
        found.latents[0].on_gpu = True  # type: ignore[attr-defined]
        return found

    forwards = Forwards(Topology())
    plan = Plan(Layout(1, 1, 1), 1, Shape(dit.heads, dit.width))
    with torch.inference_mode():
        for seed in range(4):
            given = inputs(2, seed)
            out = forwards(Call(dit, plan, given))
            assert relative_difference(out, dit.run(SequenceParallel(), given)) == 0
    if not dit.graphs:
        assert ran == ["run"] * 4
        return
    assert ran == ["run", "run"], "the third is a replay"
    first = inputs(2, 0)
    unlike = [inputs(1, 0), first.map(lambda each: each.double()), *(first.replace(**{name: None}) for name in first)]
    assert first.key == inputs(2, 7).key
    assert first.key not in {each.key for each in unlike}
    with torch.inference_mode():
        forwards(Call(dit, plan, unlike[0]))
    assert ran == ["run"] * 3


# --- step cache -------------------------------------------------------------------------------------------------------


def walk(dit: DiT, threshold: float, steps: int = 12) -> tuple[list[Output], list[Output], list[bool]]:
    """Along a run the outputs, what a forward by itself gives, and which were skipped."""
    forwards, generator = Forwards(Topology()), torch.Generator().manual_seed(1)
    inputs, exact, outs, skipped = required_inputs(dit), [], [], []
    for level in torch.linspace(1, 0.1, steps).tolist():
        inputs = at_level(dit, each_latent(inputs, lambda each: _moved(each, generator)), level)
        before = forwards.skipped
        with torch.inference_mode():
            out = forwards(Call(dit, plan_for(dit, Request(step_cache=threshold), 1, inputs), inputs))
        outs.append(out)
        exact.append(forward(dit, inputs))
        skipped.append(forwards.skipped > before)
    return outs, exact, skipped


@pytest.mark.parametrize("threshold", [0, 1e-9])
@FAMILY
def test_a_step_cache_that_skips_nothing_is_exact_to_the_bit(family: str, threshold: float) -> None:
    outs, exact, skipped = walk(tiny(family), threshold, steps=6)
    assert not any(skipped)
    assert all(map(equal, outs, exact))


@FAMILY
def test_a_huge_threshold_computes_the_first_and_every_fifth(family: str) -> None:
    outs, exact, skipped = walk(tiny(family), 1e9)
    assert skipped == [n % (MOST_IN_A_ROW + 1) != 0 for n in range(len(outs))]
    for out, expected, was_skipped in zip(outs, exact, skipped, strict=True):
        assert equal(out, expected) == (not was_skipped)
        assert relative_error(out, expected) < 0.5


# --- weights ----------------------------------------------------------------------------------------------------------


@FAMILY
def test_fp8_is_for_the_blocks_linear_layers_and_nothing_else(family: str) -> None:
    dit, twin = tiny(family), share(tiny(family))
    quantize_blocks(twin)
    blocks = [block for block in dit.trunk if isinstance(block, nn.Module)]
    layers = {id(layer) for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)}
    layers -= {id(layer) for modulating in dit.modulating for layer in modulating.modules()}
    wanted = {
        name
        for name, layer in dit.named_modules()
        if id(layer) in layers and layer.in_features % 16 == layer.out_features % 16 == 0
    }
    assert {name for name, layer in twin.named_modules() if isinstance(layer, Fp8Linear)} == wanted
    assert wanted
    assert not any(isinstance(layer, Fp8Linear) for layer in dit.modules()), "its own is whole"
    shapes = {name: weight.shape for name, weight in dit.state_dict().items()}
    assert {name: weight.shape for name, weight in twin.state_dict().items()} == shapes
    inputs = required_inputs(dit)
    assert 1e-4 < relative_error(forward(twin, inputs), forward(dit, inputs)) < 0.1


@FAMILY
def test_gradients_reach_every_parameter(family: str) -> None:
    dit = FAMILIES[family](FAMILIES[family].tiny)
    outs = tensors(dit.run(SequenceParallel(), everything(dit)))
    for method in dit.methods().values():
        specs = {name: spec for name, spec in method.arguments.items() if isinstance(spec, Argument)}
        shapes = {
            name: [size if isinstance(size, int) else 3 for size in spec.shape or ()] for name, spec in specs.items()
        }
        outs += tensors(method.run(**{name: torch.randn(shape) for name, shape in shapes.items()}))
    sum((out.square().mean() for out in outs), torch.zeros(())).backward()
    assert not [
        name for name, parameter in dit.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
