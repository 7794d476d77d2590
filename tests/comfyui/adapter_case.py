"""What Anima's text adapter gives by ComfyUI's own network, and by the nodes without that; run by ComfyUI's Python.

    PYTHONPATH=COMFYUI:PROJECT:PROJECT/client:tests/comfyui/pack python tests/comfyui/adapter_case.py

Prints a JSON map: for each compute dtype and with or without a LoRA whether the two are equal to the bit, and how far a
LoRA moves the text.
"""

from __future__ import annotations

import json
import sys

sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ldm.anima.model as anima  # noqa: E402
import comfy.ops  # noqa: E402
import small_anima  # noqa: E402
import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from comfy.weight_adapter.lora import LoRAAdapter  # noqa: E402

from comfy_nodes.adapter import adapted  # noqa: E402
from comfy_nodes.network import skeleton_layers  # noqa: E402

CONFIG = {
    "image_model": "anima",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 48,
    "num_heads": 4,
    "num_blocks": 1,
    "crossattn_emb_channels": 24,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
KEY = "diffusion_model.llm_adapter.blocks.0.cross_attn.k_proj.weight"


def main() -> None:
    """Print what was compared."""
    small_anima.shrink()
    torch.manual_seed(0)
    skeleton = anima.Anima(**CONFIG, device="meta", operations=skeleton_layers())
    shapes = {name: tuple(each.shape) for name, each in skeleton.state_dict().items()}
    state = {name: (torch.randn(shape) / shape[-1] ** 0.5).bfloat16() for name, shape in shapes.items()}
    lora = LoRAAdapter(set(), (torch.randn(24, 3), torch.randn(3, 20), None, None, None, None))
    patches = {KEY: [(0.7, lora, 1.0, None, None)]}
    text, ids, weights = torch.randn(1, 15, 20), torch.randint(0, 32128, (1, 11)), torch.rand(1, 11, 1)
    told: dict[str, bool | float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = anima.Anima(**CONFIG, device="cpu", dtype=torch.bfloat16, operations=comfy.ops.manual_cast)
        network.load_state_dict(state)
        root = torch.nn.Module()
        root.diffusion_model = network.requires_grad_(False)
        patcher = ModelPatcher(root, torch.device("cpu"), torch.device("cpu"))
        outs = []
        for kind, put_on in (("plain", {}), ("lora", patches)):
            patcher.patches = put_on
            given = (text.to(dtype), ids), {"t5xxl_weights": weights.to(dtype)}
            with torch.inference_mode():
                for key in put_on:
                    patcher.patch_weight_to_device(key, torch.device("cpu"))
                stock = network.preprocess_text_embeds(*given[0], **given[1])
                ours = adapted(skeleton, lambda: state, lambda put_on=put_on: put_on)(*given[0], **given[1])
            told[f"{dtype} {kind}"] = torch.equal(ours, stock)
            outs.append(stock.float())
        told[f"{dtype} moved"] = float((outs[1] - outs[0]).norm() / outs[0].norm())
    print(json.dumps(told))


main()
