"""Model files whose layers ComfyUI's and comfy-kitchen's own functions have packed, and tensors of no known layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
import torch
from safetensors import safe_open
from safetensors.torch import save_file

try:
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, register_layout_class
except ImportError:
    QUANT_ALGOS, QuantizedTensor = {}, None

__all__ = ["NODES"]

_NOTES = ("convrot", "convrot_groupsize", "group_size", "linear_dtype", "full_precision_matrix_mult")
"""What stands in a layer's JSON beside its format."""


def pack(layer: str, weight: torch.Tensor, said: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A layer's tensors as a file has them, and its weight in fp32 as they say it.

    Args:
        layer: The layer's name.
        weight: Its weight.
        said: Its format and that format's options; ``per_channel``: with a scale for each output.
    """
    options: dict[str, Any] = {}
    if said["format"].startswith("float8"):
        options["scale"] = "recalculate"
    elif said["format"] == "int8_tensorwise":
        options |= {"per_channel": said.get("per_channel", False), "convrot": said.get("convrot", False)}
    if "convrot_groupsize" in said:
        options["convrot_groupsize"] = said["convrot_groupsize"]
    made = QuantizedTensor.from_float(weight.float(), QUANT_ALGOS[said["format"]]["comfy_tensor_layout"], **options)
    return made.state_dict(f"{layer}.weight"), made.dequantize().float().contiguous()


class TestPack:
    """Writes a model file with some layers packed, and one with the weights that they come to.

    ``layers`` is JSON: by each layer's name its format, the options of `pack`, and ``input_scale`` and
    ``pre_quant_scale`` to put beside it.
    """

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", {"default": ""})
        asked = {"unet_name": text, "layers": text, "packed": text, "unpacked": text}
        # Which formats there are stands here for the tests to see.
        return {"required": {**asked, "spelling": (["tensors", "metadata", "both"],), "formats": (list(QUANT_ALGOS),)}}

    @classmethod
    def VALIDATE_INPUTS(cls, formats: str) -> bool:
        return True

    def make(
        self, unet_name: str, layers: str, packed: str, unpacked: str, spelling: str, formats: str
    ) -> dict[str, Any]:
        source = Path(folder_paths.get_full_path("diffusion_models", unet_name))
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        whole = dict(tensors)
        notes = {}
        for layer, said in json.loads(layers).items():
            parts, numbers = pack(layer, tensors.pop(f"{layer}.weight"), said)
            whole[f"{layer}.weight"] = numbers
            tensors |= {key: _storable(each) for key, each in parts.items()}
            if "input_scale" in said:
                tensors[f"{layer}.input_scale"] = torch.tensor(said["input_scale"])
            if "pre_quant_scale" in said:
                random = torch.Generator().manual_seed(len(layer))
                factors = 1 + said["pre_quant_scale"] * torch.rand(numbers.shape[1], generator=random)
                tensors[f"{layer}.pre_quant_scale"] = factors
                whole[f"{layer}.weight"] = numbers * factors
            notes[layer] = {"format": said["format"], **{key: said[key] for key in _NOTES if key in said}}
        save_file(whole, source.with_name(unpacked), metadata=metadata)
        if spelling != "metadata":
            for layer, note in notes.items():
                tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        if spelling != "tensors":
            metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": notes})
        save_file(tensors, source.with_name(packed), metadata=metadata)
        return {"ui": {"text": (packed,)}}


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """Powers of two (e8m0) go into files as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor.contiguous()


class TestLayout:
    """A MODEL one of whose weights is in a layout, or whose layer is in a format, that nobody knows."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", {"default": ""})
        return {"required": {"model": ("MODEL",), "layer": text, "says": text, "layout": text}}

    def make(self, model: Any, layer: str, says: str, layout: str) -> tuple[Any]:
        module = model.model.get_submodule(f"diffusion_model.{layer}")
        if says:
            module.quant_format = says
        if layout:
            weight = module.weight
            register_layout_class(layout, type(layout, (weight.layout_cls,), {}))
            module.weight = torch.nn.Parameter(
                QuantizedTensor(weight._qdata, layout, weight._params), requires_grad=False
            )
        return (model,)


NODES = (TestPack, TestLayout)
