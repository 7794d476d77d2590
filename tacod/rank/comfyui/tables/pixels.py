"""Tables of networks for images of pixels: patches are shared out, and what makes pixels of them is on each rank."""

from __future__ import annotations

from typing import Any

from tacod.rank.comfyui.tables.base import Blocks, Cut, Mask, Table, patches, width_in

__all__ = ["PIXELS"]


def _pixel_dit(network: str, *between: Blocks, **others: Any) -> Table:
    """PixelDiT and what is made of it."""
    return Table(
        network=network,
        blocks=(
            Blocks("patch_blocks", along={"pos_img": Cut(0, ("image",)), "pos_txt": Cut(0, ("text",))}),
            *between,
        ),
        tokens={"x": Cut(1, ("image",)), "y": Cut(1, ("text",))},
        gather=("patch_blocks", ("image",)),
        heads=lambda net: int(net.num_groups),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (
            min(shapes["context"][1], net.txt_max_length),
            patches(shapes["x"], net.patch_size, net.patch_size),
        ),
        further=lambda net: ({"attention_mask": Mask((1, 9), hidden=2)},),
        **others,
    )


PIXELS: tuple[Table, ...] = (
    _pixel_dit(
        "pixeldit.model.PixDiT_T2I",
        probe=lambda net: {
            "x": (1, net.in_channels, 3 * net.patch_size, 5 * net.patch_size),
            "context": (1, 9, net.txt_embed_dim),
        },
    ),
    _pixel_dit(
        "pixeldit.pid.PidNet",
        Blocks("lq_proj.gate_modules", along={"lq": Cut(1, ("image",))}),
        probe=lambda net: {
            "x": (1, net.in_channels, 3 * net.patch_size, 5 * net.patch_size),
            "context": (1, 9, net.txt_embed_dim),
            "lq_latent": (1, net.lq_proj.latent_channels, 3, 5),
            "degrade_sigma": (1,),
        },
    ),
    Table(
        network="lumina.model.NextDiTPixelSpace",
        blocks=(Blocks("layers", along={"freqs_cis": Cut(1, ("all",))}),),
        tokens={"x": Cut(1, ("all",))},
        gather=("layers", ("all",)),
        heads=lambda net: int(net.layers[0].attention.n_local_heads),
        width=lambda net: int(net.dim),
        lengths=lambda net, shapes: (shapes["context"][1] + patches(shapes["x"], net.patch_size, net.patch_size),),
        probe=lambda net: {
            "x": (1, net.in_channels, 3 * net.patch_size, 5 * net.patch_size),
            "context": (1, 9, width_in(net.cap_embedder[1])),
            "num_tokens": 9,
        },
    ),
)
