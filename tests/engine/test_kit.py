"""Each part of the kit alone, where no family shows it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

from tacod.rank.families import kit
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Argument, Inputs, Number
from tacod.rank.families.names import Names, Place
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.families.trunk import run_trunk
from tacod.rank.forward.step_cache import StepCache
from tacod.rank.ops.fp8_linear import Fp8Linear
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError
from tacod_client.tensors import to_wire

SIDES = st.lists(st.integers(1, 7), min_size=1, max_size=3)


# --- grids ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=3), st.booleans())
def test_patches_come_back_as_the_latent(sizes: list[tuple[int, int]], channels_last: bool) -> None:
    patch, sides = [size for size, _ in sizes], [size + more for size, more in sizes]
    latent = torch.arange(2.0 * 3 * math.prod(sides)).view(2, 3, *sides)
    grid = kit.Grid(latent, patch)
    patches = grid.patches(latent)
    assert patches.shape == (2, grid.length, 3 * math.prod(patch))
    if channels_last:
        patches = patches.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(2)
    # What comes after the image's tokens, such as references', is left out.
    patches = torch.cat((patches, patches[:, :1]), dim=1)
    assert torch.equal(grid.latent(patches, channels_last), latent)


def test_patches_are_in_the_order_of_sides_and_wrap_around() -> None:
    latent = torch.arange(2.0 * 3 * 5).view(1, 1, 2, 3, 5)
    grid = kit.Grid(latent, (1, 2, 2))
    assert grid.counts == (2, 2, 3)
    assert grid.patches(latent)[0, 5].tolist() == [14, 10, 4, 0], "the corner is next to the first row and column"


def test_a_side_shorter_than_half_a_patch_is_refused_by_its_name() -> None:
    with pytest.raises(ArgumentError, match="both sides 4 or more") as caught:
        kit.Grid(torch.zeros(1, 1, 1, 9), 4, "ref_latents")
    assert caught.value.argument == "ref_latents"
    with pytest.raises(ArgumentError, match=r"3 by 1 by 9.* 1 by 4 by 4.*each side as large as a patch"):
        kit.Grid(torch.zeros(1, 1, 3, 1, 9), (1, 4, 4))
    assert kit.Grid(torch.zeros(1, 1, 2, 9), 4).counts == (1, 3), "two can be padded with two"


@given(SIDES, st.data())
def test_positions_count_along_each_side(sides: list[int], data: st.DataObject) -> None:
    grid = kit.Grid(torch.zeros(1, 1, *sides), 1)
    places = list(itertools.product(*map(range, sides)))
    assert grid.positions().tolist() == [list(map(float, place)) for place in places]
    origin = data.draw(st.lists(st.integers(-9, 9), min_size=len(sides), max_size=len(sides)))
    scale = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(sides), max_size=len(sides)))
    wanted = [[o + s * p for o, s, p in zip(origin, scale, place, strict=True)] for place in places]
    torch.testing.assert_close(grid.positions(origin, scale), torch.tensor(wanted), rtol=0, atol=1e-5)


@given(SIDES, st.data())
def test_segments_number_the_rows_of_a_modulation(sides: list[int], data: st.DataObject) -> None:
    rows = [data.draw(st.sampled_from([1, side])) for side in sides]
    numbers = {place: at for at, place in enumerate(itertools.product(*map(range, rows)))}
    grid = kit.Grid(torch.zeros(1, 1, *sides), 1)
    wanted = [
        numbers[tuple(at if n > 1 else 0 for at, n in zip(place, rows, strict=True))]
        for place in itertools.product(*map(range, sides))
    ]
    assert grid.segments(rows).tolist() == wanted


@pytest.mark.parametrize("sides", [(4, 6), (2, 4, 6)])
def test_a_rank_embeds_patches_as_a_convolution_does(sides: tuple[int, ...]) -> None:
    latent, patch = torch.randn(2, 3, *sides), (1, 2, 2)[-len(sides) :]
    embed = kit.PatchEmbed(3, patch, 8)
    torch.testing.assert_close(embed(kit.Grid(latent, patch).patches(latent)), embed.whole(latent))


# --- positions, embedders, feed-forward -------------------------------------------------------------------------------


@pytest.mark.parametrize("halves", [False, True])
def test_rope_turns_each_axis_by_its_position(halves: bool) -> None:
    positions, axes = torch.tensor([[0.0, 0.0], [3.0, -2.0]]), (4, 2)
    x = torch.randn(1, 2, 3, 8)
    out = kit.rope(positions, axes, 100.0, halves).apply(x)
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[..., 6:], x[..., 6:]), "channels beyond the axes stay"
    for pair, angle in enumerate((3.0, 3.0 / 10, -2.0)):
        one, other = (pair, pair + 3) if halves else (2 * pair, 2 * pair + 1)
        before, after = (torch.complex(each[0, 1, :, one], each[0, 1, :, other]) for each in (x, out))
        torch.testing.assert_close(after, before * complex(math.cos(angle), math.sin(angle)))


def test_positions_may_differ_by_image() -> None:
    positions = torch.randn(2, 5, 1)
    both = kit.rope(positions, (4,), 100.0)
    x = torch.randn(2, 5, 1, 4)
    each = [kit.rope(positions[i], (4,), 100.0).apply(x[i : i + 1]) for i in range(2)]
    assert torch.equal(both.apply(x), torch.cat(each))


def test_a_sinusoid_is_cosines_then_sines_in_fp32() -> None:
    told = kit.sinusoid(torch.tensor([[0.0, 999.0]], dtype=torch.float64), 4)
    assert told.dtype == torch.float32
    wanted = [[1, 1, 0, 0], [math.cos(999), math.cos(9.99), math.sin(999), math.sin(9.99)]]
    torch.testing.assert_close(told[0], torch.tensor(wanted), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_an_embedder_has_its_files_names(bias: bool) -> None:
    embedder = kit.MLPEmbedder(6, 8, ("a.in_layer", "a.out_layer"), bias=bias)
    layers = {"a.in_layer", "a.out_layer"}
    kinds = ("weight", "bias") if bias else ("weight",)
    assert set(embedder.state_dict()) == {f"{layer}.{kind}" for layer in layers for kind in kinds}
    first, second = (embedder.get_submodule(name) for name in ("a.in_layer", "a.out_layer"))
    t = torch.rand(2, 3)
    assert torch.equal(embedder.numbers(t, torch.float32, 6), second(silu(first(kit.sinusoid(t, 6)))))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_exact", "silu", "swiglu", "swiglu apart"])
def test_feed_forward(activation: str, bias: bool, quantized: bool) -> None:
    torch.manual_seed(0)
    kind, apart, _ = activation.partition(" ")
    fused = kind == "swiglu" and not apart
    layers: list[Any] = [nn.Linear(16, 64 if fused else 32, bias=bias), nn.Linear(32, 16, bias=bias)]
    layers += [nn.Linear(16, 32, bias=bias)] if apart else []
    layers = [layer.requires_grad_(False) for layer in layers]
    if quantized:
        layers = [Fp8Linear.of(layer) for layer in layers]
    x = torch.randn(2, 5, 16)

    def of(layer: Any, x: Tensor) -> Tensor:
        return linear(x, layer.weight, layer.bias)

    hidden = of(layers[0], x)
    wanted = {
        "gelu": lambda: gelu(hidden, approximate="tanh"),
        "gelu_exact": lambda: gelu(hidden),
        "silu": lambda: silu(hidden),
        "swiglu": lambda: silu(hidden) * of(layers[2], x) if apart else silu(hidden[..., :32]) * hidden[..., 32:],
    }[kind]()
    out = kit.feed_forward(layers[0], layers[1], x, kind, layers[2] if apart else None)
    # Quantized layers round the tokens too.
    assert float((out - of(layers[1], wanted)).norm() / out.norm()) < (0.1 if quantized else 1e-6)


def test_an_activation_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'relu' is none of"):
        kit.feed_forward(nn.Linear(2, 2), nn.Linear(2, 2), torch.zeros(1, 1, 2), "relu")


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "head", "row"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_adds_up_its_contexts(norm: str | None, fused: bool, bias: bool) -> None:
    torch.manual_seed(0)
    kv = (("kv",), ("kv_image",)) if fused else (("k", "v"), ("k_image", "v_image"))
    norms = ("norm_q", "norm_k", "norm_k_image") if norm else ()
    made = kit.CrossAttention(
        16, 2, context_width=6, q="q", kv=kv, out="o.0", norm=norm, norms=norms, bias=bias, epsilon=1e-3
    ).requires_grad_(False)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    w = made.state_dict()
    assert {name.rpartition(".")[0] for name in w if name not in norms} == {"q", "o.0", *kv[0], *kv[1]}
    assert any(name.endswith("bias") for name in w) == bias
    x, text, image = torch.randn(2, 5, 16), torch.randn(2, 7, 6), torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]]).bool()

    def layer(name: str, x: Tensor) -> Tensor:
        return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def normed(x: Tensor, number: int) -> Tensor:
        if norm is None:
            return x
        rows = x if norm == "row" else x.unflatten(-1, (2, 8))
        return (rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * w[norms[number]]).view(x.shape)

    def part(context: Tensor, number: int, keys: Tensor | None) -> Tensor:
        k, v = layer(kv[number][0], context).chunk(2, dim=-1) if fused else (layer(n, context) for n in kv[number])
        each = (normed(layer("q", x), 0), normed(k, 1 + number), v)
        q, k, v = (one.unflatten(-1, (2, 8)).transpose(1, 2) for one in each)
        return (
            scaled_dot_product_attention(q, k, v, None if keys is None else keys[:, None, None])
            .transpose(1, 2)
            .flatten(2)
        )

    both = layer("o.0", part(text, 0, mask) + part(image, 1, None))
    torch.testing.assert_close(made(x, text, image, masks=(mask,)), both, rtol=1e-5, atol=1e-5)
    alone = layer("o.0", part(text, 0, None))
    torch.testing.assert_close(made(x, text, None), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made(x, text), alone, rtol=1e-5, atol=1e-5)


def test_layer_norms_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    made = kit.SelfAttention(16, 4, kv_heads=2, norm="layer", epsilon=1e-3).requires_grad_(False)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    w, x = made.state_dict(), torch.randn(2, 3, 16)
    q, k, v = linear(x, w["qkv.weight"], w["qkv.bias"]).split([16, 8, 8], dim=-1)
    wanted = [
        layer_norm(each.unflatten(-1, (-1, 4)), (4,), w[f"{n}_norm.weight"], w[f"{n}_norm.bias"], 1e-3)
        for n, each in (("q", q), ("k", k))
    ]
    told = made(x).by_heads()
    for one, other in zip(told, [*wanted, v.unflatten(-1, (-1, 4))], strict=True):
        torch.testing.assert_close(one, other)


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


@pytest.mark.parametrize("line", ["a.{1,2} b.{1,2,3}", "a.{1,2} b", "to_{q,k} qkv[0,1,2]"])
def test_choices_that_run_out_of_step_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="argument"):
        Names(line)
    assert not Names("")


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
        run_trunk(f, blocks, kinds, control)
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

        run_trunk(f, [block, block, block], {}, cache=cache)
        return [f.image.tokens, f.sound.tokens]

    computed, skipped = walk(), walk()
    assert cache.skipped
    assert all(map(torch.equal, computed, skipped))
    assert [float(each.mean()) for each in skipped] == [3.0, 30.0]
