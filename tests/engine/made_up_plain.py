"""The made-up families' forwards in plain PyTorch, on one process: what the kit's have to equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu

Weights = Mapping[str, Tensor]


def _layer(w: Weights, name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _embed(w: Weights, t: Tensor) -> Tensor:
    """The time's embedding, [..., W]."""
    angles = t[..., None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    hidden = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return _layer(w, "time_in.mlp.2")(silu(_layer(w, "time_in.mlp.0")(hidden)))


def _norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def _rms(x: Tensor, weight: Tensor | float, epsilon: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None = None) -> Tensor:
    """Of [B, S, H, D]; keys and values may have fewer heads, and ``keys`` [B, S] says which count: [B, S, H * D]."""
    k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], dim=2) for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def _angles(positions: Tensor, axes: Sequence[int]) -> Tensor:
    """[S, pairs], at theta 100, fp64."""
    each = [
        positions[:, at, None].double() * 100.0 ** -(torch.arange(0, width, 2).double() / width)
        for at, width in enumerate(axes)
    ]
    return torch.cat(each, dim=-1)


def _turn(x: Tensor, angles: Tensor, halves: bool) -> Tensor:
    """Complex products of pairs of the first channels of each head, [B, S, H, D]."""
    pairs = angles.shape[-1]
    front = x[..., : 2 * pairs].double()
    grouped = front.unflatten(-1, (2, pairs)).transpose(-1, -2) if halves else front.unflatten(-1, (pairs, 2))
    turned = torch.view_as_real(
        torch.view_as_complex(grouped.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    turned = (turned.transpose(-1, -2) if halves else turned).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 2 * pairs :]), dim=-1)


def _wrap(x: Tensor, *sides: int) -> Tensor:
    """``x`` padded circularly until its last sides are multiples of these."""
    for axis, side in zip(range(-len(sides), 0), sides, strict=True):
        x = x.index_select(axis, torch.arange(math.ceil(x.shape[axis] / side) * side) % x.shape[axis])
    return x


def _places(*counts: int, origin: float = 0.0) -> Tensor:
    """Each patch's place along each side, [N, sides]; the first side begins at ``origin``."""
    places = torch.cartesian_prod(*(torch.arange(float(count)) for count in counts))
    return places + torch.tensor([origin, *[0.0] * (len(counts) - 1)])


def video(w: Weights, x: Tensor, timestep: Tensor, context: Tensor, **more: Any) -> Tensor:
    """Of `Video` with heads of 8 channels. ``control`` is one residual for after the first block, [1 or B, N, W]."""
    padded = _wrap(x, 2, 2)
    batch, channels, frames, height, width = padded.shape
    cut = padded.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    patches = torch.einsum("bctyhxw->btyxchw", cut).flatten(1, 3).flatten(2)
    tokens = linear(patches, w["patch_embed.proj.weight"].flatten(1), w["patch_embed.proj.bias"])
    angles = _angles(_places(frames, height // 2, width // 2), (2, 2, 2))
    c = silu(_embed(w, timestep)).repeat_interleave(height * width // 4, dim=1)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8))

    block = 0
    while f"blocks.{block}.w1.weight" in w:
        b = f"blocks.{block}"
        parts = _layer(w, f"{b}.modulation.lin")(c).chunk(6, dim=-1)
        normed = _norm(tokens) * (1 + parts[1]) + parts[0]
        q, k = (
            _turn(
                heads(_rms(_layer(w, f"{b}.self_attn.{n}")(normed), w[f"{b}.self_attn.norm_{n}.weight"], 1e-6)),
                angles,
                True,
            )
            for n in "qk"
        )
        attended = _attend(q, k, heads(_layer(w, f"{b}.self_attn.v")(normed)))
        tokens = tokens + parts[2] * _layer(w, f"{b}.self_attn.o")(attended)
        b += ".cross_attn"
        q = heads(_rms(_layer(w, f"{b}.q")(_norm(tokens)), w[f"{b}.norm_q.weight"], 1e-6))
        total = torch.zeros_like(tokens)
        for source, suffix, keys in (
            (context, "", more.get("attention_mask")),
            (more.get("clip_fea"), "_img", None),
        ):
            if source is not None:
                k = heads(_rms(_layer(w, f"{b}.k{suffix}")(source), w[f"{b}.norm_k{suffix}.weight"], 1e-6))
                total = total + _attend(q, k, heads(_layer(w, f"{b}.v{suffix}")(source)), keys)
        tokens = tokens + _layer(w, f"{b}.o")(total)
        b = f"blocks.{block}"
        normed = _norm(tokens) * (1 + parts[4]) + parts[3]
        hidden = silu(_layer(w, f"{b}.w1")(normed)) * _layer(w, f"{b}.w3")(normed)
        tokens = tokens + parts[5] * _layer(w, f"{b}.w2")(hidden)
        if block == 0 and more.get("control") is not None:
            residual = more["control"]
            tokens = torch.cat((tokens[:, : residual.shape[1]] + residual, tokens[:, residual.shape[1] :]), dim=1)
        block += 1
    shift, scale = _layer(w, "final_layer.adaLN_modulation.1")(c).chunk(2, dim=-1)
    out = _layer(w, "final_layer.linear")(_norm(tokens) * (1 + scale) + shift)
    grid = out.unflatten(1, (frames, height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
    return torch.einsum("btyxchw->bctyhxw", grid).reshape(padded.shape)[..., : x.shape[-2], : x.shape[-1]]


def joint(w: Weights, x: Tensor, timestep: Tensor, context: Tensor, **more: Any) -> Tensor:
    """Of `Joint`, with heads of 8 channels."""
    patches, places, rows = [], [], []
    for at, latent in enumerate((x, *more.get("ref_latents", ()))):
        latent = _wrap(latent, 2, 2)
        height, width = latent.shape[2] // 2, latent.shape[3] // 2
        cut = latent.reshape(*latent.shape[:2], height, 2, width, 2)
        patches.append(torch.einsum("bcyhxw->byxchw", cut).flatten(1, 2).flatten(2))
        places.append(_places(height, width, origin=10.0 * at))
        rows.append(timestep[:, None].expand(-1, height * width) * (at == 0))
    image, angles = _layer(w, "img_in")(torch.cat(patches, dim=1)), _angles(torch.cat(places), (4, 4))
    c_image = silu(_embed(w, 1000 * torch.cat(rows, dim=1)))
    c_text = silu(_embed(w, 1000 * timestep))[:, None]
    text = layer_norm(context, context.shape[-1:], w["txt_norm.weight"], w["txt_norm.bias"])
    text = _layer(w, "txt_in")(text)
    keys = more.get("attention_mask")

    def project(b: str, tokens: Tensor, scale: Tensor | float, turn: bool) -> list[Tensor]:
        normed = _rms(tokens, w[f"{b}.norms.0"], 1e-5) * (1 + scale)
        q, k, v = (each.unflatten(-1, (-1, 8)) for each in _layer(w, f"{b}.attn.qkv")(normed).chunk(3, dim=-1))
        q, k = (_rms(each, w[f"{b}.attn.{n}_norm.scale"], 1e-5) for each, n in ((q, "q"), (k, "k")))
        return [_turn(q, angles, False), _turn(k, angles, False), v] if turn else [q, k, v]

    def after(b: str, tokens: Tensor, attended: Tensor, gate: Any, scale: Any, mlp_gate: Any) -> Tensor:
        tokens = tokens + gate * _rms(_layer(w, f"{b}.attn.proj")(attended), w[f"{b}.norms.1"], 1e-5)
        normed = _rms(tokens, w[f"{b}.norms.2"], 1e-5) * (1 + scale)
        hidden = _layer(w, f"{b}.fc2")(gelu(_layer(w, f"{b}.fc1")(normed)))
        return tokens + mlp_gate * _rms(hidden, w[f"{b}.norms.3"], 1e-5)

    text = after("refiner.0", text, _attend(*project("refiner.0", text, 0.0, False), keys), 1.0, 0.0, 1.0)
    whole = None if keys is None else torch.cat((keys, keys.new_ones(len(keys), image.shape[1])), dim=1)
    block = 0
    while f"layers.{block}.img.fc1.weight" in w:
        b = f"layers.{block}"
        t, i = (_layer(w, f"{b}.{n}.modulation.1")(c).chunk(4, dim=-1) for n, c in (("txt", c_text), ("img", c_image)))
        of_text, of_image = project(f"{b}.txt", text, t[0], False), project(f"{b}.img", image, i[0], True)
        attended = _attend(*(torch.cat(each, dim=1) for each in zip(of_text, of_image, strict=True)), whole)
        length = text.shape[1]
        text = after(f"{b}.txt", text, attended[:, :length], t[1].tanh(), t[2], t[3].tanh())
        image = after(f"{b}.img", image, attended[:, length:], i[1].tanh(), i[2], i[3].tanh())
        block += 1
    shift, scale = _layer(w, "final_layer.adaLN_modulation.1")(c_image).chunk(2, dim=-1)
    out = _layer(w, "final_layer.linear")(_rms(image, 1.0, 1e-5) * (1 + scale) + shift)
    height, width = (math.ceil(side / 2) for side in x.shape[2:])
    grid = out[:, : height * width].unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2))
    latent = torch.einsum("byxchw->bcyhxw", grid).reshape(len(x), -1, 2 * height, 2 * width)
    return latent[..., : x.shape[2], : x.shape[3]]


def pair(
    w: Weights,
    x: Sequence[Tensor],
    timestep: Sequence[Tensor],
    context: Tensor,
    denoise_mask: Tensor | None = None,
    audio_denoise_mask: Tensor | None = None,
) -> list[Tensor]:
    """Of `Pair`, with heads of 8 channels."""
    masks = denoise_mask, audio_denoise_mask
    x = [each if mask is None else each * (1 + mask[:, :1]) for each, mask in zip(x, masks, strict=True)]
    padded = _wrap(x[0], 2, 2)
    batch, channels, frames, height, width = padded.shape
    cut = padded.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    patches = torch.einsum("bctyhxw->btyxchw", cut).flatten(1, 3).flatten(2)
    streams = {
        "sound": _layer(w, "sound_in")(x[1].transpose(1, 2).flatten(2)),
        "video": linear(patches, w["patch_embed.proj.weight"].flatten(1), w["patch_embed.proj.bias"]),
    }
    text = _layer(w, "text_in")(context.mean(1))[:, None]
    rows = {name: each.reshape(len(each), -1) for name, each in zip(("video", "sound"), timestep, strict=True)}
    conditioning = {name: silu(_embed(w, 1000 * each) + text) for name, each in rows.items()}
    block = 0
    while f"blocks.{block}.sound.fc1.weight" in w:
        made = []
        for name, tokens in streams.items():
            b = f"blocks.{block}.{name}"
            shift, scale = _layer(w, f"{b}.modulation.lin")(conditioning[name]).chunk(2, dim=-1)
            qkv = _layer(w, f"{b}.attn.qkv")(_norm(tokens) * (1 + scale) + shift)
            q, k, v = (each.unflatten(-1, (-1, 8)) for each in qkv.chunk(3, dim=-1))
            q, k = (
                _norm(each) * w[f"{b}.attn.{n}_norm.weight"] + w[f"{b}.attn.{n}_norm.bias"]
                for each, n in ((q, "q"), (k, "k"))
            )
            made.append((q, k, v))
        lengths = [tokens.shape[1] for tokens in streams.values()]
        attended = _attend(*(torch.cat(each, dim=1) for each in zip(*made, strict=True))).split(lengths, dim=1)
        for name, mine in zip(list(streams), attended, strict=True):
            b = f"blocks.{block}.{name}"
            tokens = streams[name] + _layer(w, f"{b}.attn.proj")(mine)
            streams[name] = tokens + _layer(w, f"{b}.fc2")(silu(_layer(w, f"{b}.fc1")(_norm(tokens))))
        block += 1
    grid = _layer(w, "video_out")(_norm(streams["video"])).unflatten(1, (frames, height // 2, width // 2))
    moving = torch.einsum("btyxchw->bctyhxw", grid.unflatten(-1, (-1, 2, 2))).reshape(padded.shape)
    sound = _layer(w, "sound_out")(_norm(streams["sound"])).unflatten(-1, (-1, 4)).transpose(1, 2)
    return [moving[..., : x[0].shape[-2], : x[0].shape[-1]], sound]
