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
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod_client.errors import ArgumentError

SIDES = st.lists(st.integers(1, 7), min_size=1, max_size=3)


# --- grids ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=3), st.booleans())
def test_patches_come_back_as_the_latent(sizes: list[tuple[int, int]], channels_last: bool) -> None:
    patch, sides = [size for size, _ in sizes], [size + more for size, more in sizes]
    latent = torch.arange(2.0 * 3 * math.prod(sides)).view(2, 3, *sides)
    grid = kit.Grid(latent, patch)
    patches = grid.patches(latent, channels_last)
    assert patches.shape == (2, grid.length, 3 * math.prod(patch))
    if channels_last:
        turned = grid.patches(latent).unflatten(-1, (3, -1)).transpose(-1, -2).flatten(2)
        assert torch.equal(patches, turned)
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


def test_a_sinusoids_scale_is_of_its_angles() -> None:
    """The fastest turns by 1 times t, so nothing is rounded there; a slower one shows where the factor went."""
    t = torch.tensor([0.7373])
    angle = 1000 * (t * torch.exp(torch.tensor(-math.log(10000) / 2)))
    told = kit.sinusoid(t, 4, scale=1000.0)
    assert torch.equal(told[0], torch.cat(((1000 * t).cos(), angle.cos(), (1000 * t).sin(), angle.sin())))
    embedder = kit.MLPEmbedder(4, 8)
    assert torch.equal(embedder.numbers(t, torch.float32, 4, scale=1000.0), embedder(told))


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_an_embedder_has_its_files_names(bias: bool, hidden: int | None) -> None:
    embedder = kit.MLPEmbedder(6, 8, ("a.in_layer", "a.out_layer"), bias=bias, hidden=hidden)
    layers = {"a.in_layer", "a.out_layer"}
    kinds = ("weight", "bias") if bias else ("weight",)
    assert set(embedder.state_dict()) == {f"{layer}.{kind}" for layer in layers for kind in kinds}
    first, second = (embedder.get_submodule(name) for name in ("a.in_layer", "a.out_layer"))
    assert [tuple(each.weight.shape) for each in (first, second)] == [(hidden or 8, 6), (8, hidden or 8)]
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


def test_a_modulations_layer_may_have_any_name() -> None:
    made = kit.Modulation(4, 8, "linear")
    assert set(made.state_dict()) == {"linear.weight", "linear.bias"}
    assert made.get_submodule("linear") is made.linear
    made.set_submodule("linear", nn.Linear(4, 8, bias=False))
    assert set(made.state_dict()) == {"linear.weight"}


@pytest.mark.parametrize(
    ("method", "scale", "wanted"),
    [
        ("index", -1.0, [(-1.0, 0, 0), (-2.0, 0, 0), (-3.0, 0, 0)]),
        # 5 by 9 below the image's corner as it is the less tall; 9 by 4 and 3 by 3 then where they make less of a side.
        ("offset", 1.0, [(1.0, 0, 0), (1.0, 0, 5), (1.0, 5, 0)]),
    ],
)
def test_references_of_videos_are_placed_by_their_pictures(method: str, scale: float, wanted: Any) -> None:
    sides = [(8, 11), (5, 9), (9, 4), (3, 3)]
    flat = [kit.Grid(torch.zeros(1, 1, *each), 2) for each in sides]
    deep = [kit.Grid(torch.zeros(1, 1, 3, *each), (1, 2, 2)) for each in sides]
    assert kit.reference_origins(deep, method, scale) == kit.reference_origins(flat, method, scale) == wanted


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
