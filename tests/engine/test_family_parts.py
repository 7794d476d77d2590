"""What families are told by and work on: tables of names, inputs, streams, residuals and the trunk."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import required_inputs, tiny, with_optional
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tacod.rank.comm.transport import _Joined
from tacod.rank.families import kit
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Argument, Inputs, Number
from tacod.rank.families.names import Names, Place
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.families.trunk import Trunk
from tacod.rank.forward.run import relative_difference
from tacod.rank.forward.step_cache import StepCache
from tacod.rank.ops.fused import Residual
from tacod.rank.ops.qkv import QKV
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.tensors import to_wire

# --- names ------------------------------------------------------------------------------------------------------------

TABLE = Names("""
    embed                       x_in
    time.linear_{1,2}           t_in.mlp.{0,2}
    blocks.*.to_{q,k,v}         layers.*.qkv[0,1,2]
    blocks.*.mlp                layers.*.fused[2:]
    blocks.*.to_gate            layers.*.fused[0]
    blocks.*.to_up              layers.*.fused[1]
    norm_out                    final.mod~
    table                       layers.table
""")
SHAPES = {
    "x_in.weight": (8, 3),
    "x_in.bias": (8,),
    "t_in.mlp.0.weight": (8, 4),
    "t_in.mlp.2.weight": (8, 8),
    "layers.0.qkv.weight": (24, 8),
    "layers.0.qkv.bias": (24,),
    "layers.11.fused.weight": (40, 8),
    "final.mod.weight": (16, 8),
    "layers.table": (6, 8),
}


def test_a_table_of_names_places_every_tensor() -> None:
    places = TABLE.layout(SHAPES)
    assert places["embed.bias"] == Place("x_in.bias")
    assert places["time.linear_2.weight"] == Place("t_in.mlp.2.weight")
    assert [places[f"blocks.0.to_{n}.bias"].rows for n in "qkv"] == [(0, 8), (8, 8), (16, 8)]
    assert [places[f"blocks.11.{n}.weight"].rows for n in ("to_gate", "to_up", "mlp")] == [(0, 8), (8, 8), (16, 24)]
    assert places["norm_out.weight"] == Place("final.mod.weight", swap=True)
    assert places["table"] == Place("layers.table")
    rows = {
        key: sum((place.rows or (0, SHAPES[key][0]))[1] for place in places.values() if place.key == key)
        for key in SHAPES
    }
    assert rows == {key: shape[0] for key, shape in SHAPES.items()}, "each row has one place"


def test_a_table_of_names_goes_both_ways() -> None:
    theirs = {
        name: ((place.rows[1],) if place.rows else SHAPES[place.key][:1]) + SHAPES[place.key][1:]
        for name, place in TABLE.layout(SHAPES).items()
    }
    assert TABLE.ours(theirs) == SHAPES
    assert all(map(TABLE.knows, theirs))
    assert not TABLE.knows("blocks.0.to_z.weight")
    assert TABLE.ours({"stranger.weight": (1,)}) == {}


def test_rows_of_a_single_part_are_not_exchanged() -> None:
    assert not TABLE.layout({"final.mod.weight": (8, 8)})["norm_out.weight"].swap


def test_a_line_of_one_pattern_is_of_the_same_names() -> None:
    table = Names("layers.*.to_{q,k}")
    shapes = {f"layers.{i}.to_{part}.weight": (4, 4) for i in range(2) for part in "qk"}
    assert table.layout(shapes) == {name: Place(name) for name in shapes}
    assert table.ours(shapes) == shapes


@pytest.mark.parametrize("line", ["a.{1,2} b.{1,2,3}", "a.{1,2} b", "to_{q,k} qkv[0,1,2]"])
def test_choices_that_run_out_of_step_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="argument"):
        Names(line)
    assert not Names("")


def test_keys_and_values_may_be_fewer_than_queries() -> None:
    names = Names("blocks.*.to_{q,k,v}  layers.*.qkv[q,k,v]")
    for kv in (8, 2):
        shapes = {"layers.3.qkv.weight": (8 + 2 * kv, 8)}
        layout = names.layout(shapes)
        rows = {name: place.rows for name, place in layout.items()}
        starts = {"q": (0, 8), "k": (8, kv), "v": (8 + kv, kv)}
        assert rows == {f"blocks.3.to_{part}.weight": each for part, each in starts.items()}
        assert names.ours({name: (count, 8) for name, (_, count) in rows.items()}) == shapes


def test_of_several_tables_the_one_that_knows_most_counts() -> None:
    one = "out  last\nblocks.*.{up,down,norm}  layers.*.{w1,w2,norm}"
    other = "head  last\nblocks.*.{linear_1,linear_2,norm}  layers.*.{w1,w2,norm}\nblocks.*.gate  layers.*.w3"
    names = Names(one, other)
    shapes = dict.fromkeys(("last.weight", "layers.0.w1.weight", "layers.0.norm.weight"), (4, 4))
    assert set(names.layout(shapes)) == {"out.weight", "blocks.0.up.weight", "blocks.0.norm.weight"}
    gated = {**shapes, "layers.0.w3.weight": (4, 4)}
    theirs = {"head.weight", "blocks.0.linear_1.weight", "blocks.0.norm.weight", "blocks.0.gate.weight"}
    assert set(names.layout(gated)) == theirs
    assert names.ours(dict.fromkeys(theirs, (4, 4))) == gated
    assert all(map(names.knows, [*theirs, "out.weight"]))
    assert not names.knows("in.weight")
    assert names.lacks(["blocks.0.norm.weight", "blocks.0.gate.weight"]) == ["head"]
    assert names.lacks(["blocks.0.norm.weight", "blocks.0.up.weight"]) == ["out"]


# --- inputs -----------------------------------------------------------------------------------------------------------

SPECS = {
    "x": Argument(("B", 4, "T", "H"), many=True, others=(("B", 3, "S"),)),
    "timestep": Argument(("B",), fp32=True),
    "mask": Argument(("B", "L"), keys=True, shared=True, required=False),
    "table": Argument(("R", 2), required=False),
    "scale": Number(0, 1),
}


def some(seed: int = 0, batch: int = 2, **more: Any) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(batch, 4, 2, 3, generator=g), torch.randn(batch, 3, 5, generator=g)]
    return Inputs({"x": x, "timestep": torch.rand(batch, generator=g), "absent": None, **more}, SPECS)


def test_inputs_are_lists_too() -> None:
    one = some(table=torch.ones(2, 2), scale=0.5)
    assert "absent" not in one
    assert one.batch == 2
    assert [tuple(each.shape) for each in one.tensors] == [(2, 4, 2, 3), (2, 3, 5), (2,), (2, 2)]
    doubled = one.map(lambda each: 2 * each)
    assert torch.equal(doubled["x"][1], 2 * one["x"][1])
    assert doubled["scale"] == 0.5
    part = one.images(slice(1, 2))
    assert torch.equal(part["x"][0], one["x"][0][1:])
    assert torch.equal(part["table"], one["table"]), "it has no batch"
    members = SPECS["x"].members  # type: ignore[union-attr]
    assert members is not None
    assert [each.shape for each in members] == [("B", 4, "T", "H"), ("B", 3, "S")]


def test_a_graph_is_for_shapes_dtypes_and_all_that_is_no_tensor() -> None:
    assert some(0).key == some(1).key
    others = [some(batch=1), some(scale=0.5), some(table=torch.ones(1, 2)), some().map(Tensor.half)]
    assert len({some().key, *(each.key for each in others)}) == 5
    kept = some(0).map(torch.clone)
    kept.copy_(some(1))
    assert all(map(torch.equal, kept.tensors, some(1).tensors))


def test_inputs_stack_where_they_agree() -> None:
    joint = Inputs.stack([some(0), some(1)], 2)
    assert joint is not None
    assert torch.equal(joint["x"][1], torch.cat((some(0)["x"][1], some(1)["x"][1])))
    table = torch.ones(2, 2)
    shared = [some(n, table=table, mask=torch.ones(1, 3).bool(), scale=0.5) for n in range(2)]
    stacked = Inputs.stack(shared, 2)
    assert stacked is not None
    assert (stacked["mask"].shape, stacked["scale"]) == ((4, 3), 0.5), "a batch of 1 broadcasts first"
    assert torch.equal(stacked["table"], table)
    for other in (some(table=2 * table), some(scale=0.25), some(), some(table=table[:1])):
        assert Inputs.stack([some(table=table), other], 2) is None


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3), st.booleans())
def test_hidden_tokens_are_left_out(rows: list[list[bool]], only_last: bool) -> None:
    mask, text = torch.tensor(rows), torch.arange(5.0).expand(len(rows), 5)[..., None]
    told = kit.drop_hidden(Inputs({"mask": mask, "text": text}, {}), "mask", "text", only_last=only_last)
    seen = [at for at in range(5) if any(row[at] for row in rows)]
    if not seen:
        assert torch.equal(told["text"], text), "no token counts: the family has to say what that means"
        return
    if only_last:
        seen = list(range(seen[-1] + 1))
    assert told["text"][0, :, 0].tolist() == seen
    if mask[:, seen].all():
        assert "mask" not in told
    else:
        assert torch.equal(told["mask"], mask[:, seen])


# --- streams, control, the trunk --------------------------------------------------------------------------------------


def begun(*lengths: int) -> ForwardPass:
    f = ForwardPass(SequenceParallel())
    f.image = Stream(torch.zeros(1, lengths[-1], 2), lengths[-1:])
    return f


def test_layers_may_have_conditionings_of_their_own() -> None:
    f, (one, other) = begun(3), (nn.Linear(4, 6), nn.Linear(4, 6))
    f.modulate([one], torch.zeros(1, 4))
    f.modulate([other], torch.zeros(1, 2, 4))
    assert [tuple(each.shape) for each in f.modulation(one, 3)] == [(1, 1, 2)] * 3
    assert [tuple(each.shape) for each in f.modulation(other, 2)] == [(1, 2, 3)] * 2


def test_joined_streams_keep_their_segments() -> None:
    f = begun(3)
    f.text = Stream(torch.zeros(1, 2, 2), (2,))
    assert f.join(f.text, f.image).segments is None
    f.part()
    f.text.segments, f.image.segments = torch.tensor([1, 0]), torch.tensor([0, 0, 1])
    joint = f.join(f.text, f.image)
    assert joint.segments is not None
    assert joint.segments.tolist() == [1, 0, 0, 0, 1]


def test_joined_streams_take_memory_once() -> None:
    f = begun(3)
    f.text = Stream(torch.ones(1, 2, 2), (2,))
    before = [weakref.ref(stream.tokens) for stream in (f.text, f.image)]
    f.join(f.text, f.image)
    assert [each() for each in before] == [None, None]
    assert (f.text.size, f.image.size, f.image.dtype) == (2, 3, torch.float32)
    f.part()
    assert f.text.tokens.tolist() == [[[1, 1], [1, 1]]]


@pytest.mark.parametrize("length", [1, 3])
def test_residuals_are_for_the_first_tokens_after_their_block(length: int) -> None:
    f = begun(3)
    control = Control({"input": [None, to_wire(torch.ones(1, length, 2), "control")]})
    seen: list[float] = []

    def block(f: ForwardPass) -> None:
        seen.append(float(f.image.tokens.sum()))
        f.image.add(None, torch.zeros_like(f.image.tokens))

    blocks = [lambda f: block(f), lambda f: block(f), lambda f: block(f)]
    kinds = {id(each): ("input", at) for at, each in enumerate(blocks)}
    with torch.inference_mode():
        Trunk(f, blocks, kinds, control).run()
    assert seen == [0, 0, 2 * length]
    assert f.image.tokens[0, :, 0].tolist() == [1.0] * length + [0.0] * (3 - length)


def test_a_skipped_step_moves_every_latent() -> None:
    cache = StepCache(0.5, 1.0)

    def walk() -> list[Tensor]:
        f = begun(3)
        f.sound = Stream(torch.zeros(1, 2, 5), (2,))
        f.outputs = (f.image, f.sound)

        def block(f: ForwardPass) -> None:
            f.image.add(None, torch.full((1, 3, 2), 1.0))
            f.sound.add(None, torch.full((1, 2, 5), 10.0))

        Trunk(f, [block, block, block], {}).run(cache)
        return [f.image.tokens, f.sound.tokens]

    computed, skipped = walk(), walk()
    assert cache.skipped
    assert all(map(torch.equal, computed, skipped))
    assert [float(each.mean()) for each in skipped] == [3.0, 30.0]


# --- what is put off --------------------------------------------------------------------------------------------------


def test_a_change_that_is_put_off_comes_before_the_next_use() -> None:
    tokens = torch.randn(1, 3, 8)

    def doubled(stream: Residual) -> Callable[[], None]:
        return lambda: stream.add(None, stream.tokens.clone())

    for use in (
        lambda stream: stream.tokens,
        lambda stream: stream.normed(),
        lambda stream: (stream.add(None, torch.zeros_like(tokens)), stream.tokens)[1],
        lambda stream: (stream.later(lambda: None), stream.tokens)[1],
    ):
        late, now = Residual(tokens), Residual(tokens)
        late.later(doubled(late))
        doubled(now)()
        assert torch.equal(use(late), use(now))  # type: ignore[no-untyped-call]
        assert torch.equal(late.tokens, 2 * tokens)
    gone = Residual(tokens)
    gone.later(doubled(gone))
    gone.tokens = tokens
    assert torch.equal(gone.tokens, tokens), "of tokens that are no more"


@pytest.mark.parametrize("family", ["flux", "flux2", "chroma", "qwen_image", "sd3"])
def test_a_texts_mlp_runs_while_the_images_heads_travel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the next block, and no bit depends on it."""
    dit = tiny(family)
    inputs = with_optional(dit, required_inputs(dit, batch=2, sides=(9, 13)))
    ran: list[str] = []

    def is_put_off(ran: list[str]) -> bool:
        """Whether the first block's MLP of the text comes after the second block has sent the image's heads."""
        second = ran.index("image", ran.index("image") + 1)
        return ran.index("mlp of text") > second

    send, mlp = _Joined.send, kit.MLP.forward

    def sending(self: Any, qkv: QKV, stream: int, overlap: bool) -> None:
        ran.append(("text", "image")[stream])
        send(self, qkv, stream, overlap)

    def computing(self: Any, x: Tensor) -> Tensor:
        ran.append(f"mlp of {'text' if x.shape[1] == length else 'image'}")
        return mlp(self, x)

    length = dit.lengths(inputs)[0]
    monkeypatch.setattr(_Joined, "send", sending)
    monkeypatch.setattr(kit.MLP, "forward", computing)
    with torch.inference_mode():
        out = dit.run(SequenceParallel(), inputs)
    assert length < dit.lengths(inputs)[-1]
    assert is_put_off(ran)
    monkeypatch.setattr(Residual, "later", lambda self, change: change())
    ran.clear()
    with torch.inference_mode():
        at_once = dit.run(SequenceParallel(), inputs)
    assert not is_put_off(ran)
    assert relative_difference(out, at_once) == 0


def test_an_input_may_have_any_name() -> None:
    """A network of ComfyUI's that passes arguments on takes any that clients send."""
    assert Inputs({"x": 1}, {}).replace(self=2)["self"] == 2
