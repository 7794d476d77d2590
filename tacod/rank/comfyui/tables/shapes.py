"""Tables of networks for three-dimensional shapes."""

from __future__ import annotations

from tacod.rank.comfyui.tables.base import Blocks, Cut, Table, width_in

__all__ = ["SHAPES"]

SHAPES: tuple[Table, ...] = (
    Table(
        network="hunyuan3d.model.Hunyuan3Dv2",
        blocks=(Blocks("double_blocks"), Blocks("single_blocks")),
        tokens={"txt": Cut(1, ("text",)), "img": Cut(1, ("shape",))},
        gather=("final_layer", ("shape",)),
        heads=lambda net: int(net.double_blocks[0].num_heads),
        width=lambda net: int(net.latent_in.out_features),
        lengths=lambda net, shapes: (shapes["context"][1], shapes["x"][2]),
        probe=lambda net: {"x": (1, width_in(net.latent_in), 37), "context": (1, 9, width_in(net.cond_in))},
        further=lambda net: ({"guidance": (1,)},),
    ),
    Table(
        network="hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",
        blocks=(Blocks("blocks", attention={"attn2": None}),),
        tokens={"hidden_states": Cut(1, ("all",))},
        # The layer behind the blocks leaves out the first token.
        gather=("blocks", ("all",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (1 + shapes["x"][2],),
        probe=lambda net: {"x": (1, net.in_channels, 37), "context": (1, 9, net.context_dim)},
        further=lambda net: ({"guidance": (1,)},),
        attention_names=("hunyuan3dv2_1.hunyuandit.optimized_attention",),
    ),
    Table(
        network="triposplat.model.LatentSeqMMFlowModel",
        blocks=(Blocks("blocks"),),
        # Positions are made of tokens before each block.
        tokens={"x": Cut(1, ("all",)), "rotary_emb": Cut(1, ("all",))},
        gather=("blocks", ("all",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.model_channels),
        lengths=lambda net, shapes: (shapes["x"][0][1] + shapes["context"][1] + shapes["x"][1][1],),
        probe=lambda net: {
            "x": [(1, net.q_token_length, net.in_channels), (1, 1, net.cam_channels)],
            "context": (1, 9, net.cond_channels),
        },
        further=lambda net: () if net.cond_embedder2 is None else ({"ref_latents": [(1, net.cond2_channels, 2, 3)]},),
    ),
)
