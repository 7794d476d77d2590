"""The rivals on our weights: diffusers' classes and xfuser's wrappers over views of our model's parameters.

Each function returns a forward that takes nothing and gives the image [B, C, H, W]. Where a rival can't, it raises.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tacod.rank.families.base import DiT

__all__ = ["compiled", "context_parallel", "eager", "xfuser"]

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("LOG_LEVEL", "error")  # xfuser's

Forward = Callable[[], Tensor]
Config = Mapping[str, Any]
Inputs = Mapping[str, Any]

FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The attention kernels that PyTorch brings, best first on an H100."""
GROUPS = ("_MODEL_REPLICA", "_DP", "_CFG", "_PP", "_SP", "_TP", "_FS", "_VAE", "_DIT")
"""xfuser's module-wide groups, of which there is one layout at a time."""


# --- the ways ---------------------------------------------------------------------------------------------------------


def eager(dit: DiT, config: Config, inputs: Inputs) -> Forward:
    """As diffusers comes, with PyTorch's fastest attention."""
    return _caller(_model(_class(dit), dit, config, inputs), dit, inputs)


def compiled(dit: DiT, config: Config, inputs: Inputs) -> Forward:
    """With diffusers' `compile_repeated_blocks`; what it doesn't know the blocks of is told them."""
    torch._dynamo.reset()
    model = _model(_class(dit), dit, config, inputs)
    model._repeated_blocks = model._repeated_blocks or [type(model.transformer_blocks[0]).__name__]
    model.compile_repeated_blocks()
    return _caller(model, dit, inputs)


def context_parallel(dit: DiT, config: Config, inputs: Inputs, world_size: int) -> Forward:
    """Ulysses by diffusers; with its ``ulysses_anything`` where tokens don't divide."""
    from diffusers import ContextParallelConfig

    model = _model(_class(dit), dit, config, inputs)
    if model._cp_plan is None:
        raise NotImplementedError(f"diffusers has no plan for {type(model).__name__}")
    uneven = any(n % world_size for n in (*dit.lengths(inputs), dit.heads))
    # A machine without an accelerator has none to count.
    counted = mock.patch("torch.accelerator.device_count", return_value=world_size)
    with counted if inputs["x"].device.type == "cpu" else nullcontext():
        ranks = ContextParallelConfig(ulysses_degree=world_size, ulysses_anything=uneven)  # type: ignore[no-untyped-call]
        model.enable_parallelism(config=ranks)
    return _caller(model, dit, inputs)


def xfuser(dit: DiT, config: Config, inputs: Inputs, world_size: int, split_batch: bool) -> Forward:
    """By xfuser's own wrapper: all ranks share the sequence, or half of them each of the batch's two halves."""
    groups = 2 if split_batch else 1
    state = _xfuser_groups(world_size, groups)
    with state.within():
        make = {"flux": _xfuser_flux, "sd3": _xfuser_sd3, "pixart": _xfuser_pixart}[dit.family]
        run = make(dit, config, inputs, world_size // groups, split_batch)

    def forward() -> Tensor:
        with state.within(), sdpa_kernel(FASTEST, set_priority=True):
            return run()

    return forward


# --- their models, our weights ----------------------------------------------------------------------------------------


def _class(dit: DiT) -> Any:
    import diffusers

    name = {"flux": "FluxTransformer2DModel", "sd3": "SD3Transformer2DModel", "pixart": "PixArtTransformer2DModel"}
    return getattr(diffusers, name[dit.family])


def _model(kind: Any, dit: DiT, config: Config, inputs: Inputs) -> Any:
    """A model of theirs that holds our weights: views where it keeps apart what our file fuses."""
    side = inputs["x"].shape[-1]
    with torch.device("meta"):
        model = kind(**{"flux": _flux, "sd3": _sd3, "pixart": _pixart}[dit.family](config, side))
    if dit.family == "pixart":
        model.pos_embed = _positions(model, inputs["x"].device)
    ours = dit.state_dict()
    weights = {}
    for name, place in type(dit).diffusers_layout(config).items():
        weight = ours[place.key] if place.rows is None else ours[place.key].narrow(0, *place.rows)
        weights[name] = torch.cat(weight.chunk(2)[::-1]) if place.swap else weight
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _flux(config: Config, side: int) -> dict[str, Any]:
    return {
        "in_channels": 4 * config["in_channels"],
        "num_layers": config["depth"],
        "num_single_layers": config["depth_single_blocks"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "num_attention_heads": config["num_heads"],
        "joint_attention_dim": config["context_in_dim"],
        "pooled_projection_dim": config["vec_in_dim"],
        "guidance_embeds": config["guidance_embed"],
        "axes_dims_rope": tuple(config["axes_dim"]),
    }


def _sd3(config: Config, side: int) -> dict[str, Any]:
    return {
        "sample_size": side,
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "num_layers": config["depth"],
        "num_attention_heads": config["depth"],
        "joint_attention_dim": config["context_embedder_config"]["params"]["in_features"],
        "caption_projection_dim": 64 * config["depth"],
        "pooled_projection_dim": config["adm_in_channels"],
        "pos_embed_max_size": config["pos_embed_max_size"],
        "qk_norm": "rms_norm",
    }


def _pixart(config: Config, side: int) -> dict[str, Any]:
    """``sample_size`` goes with the picture, so that its positions are ComfyUI's at every size."""
    return {
        "sample_size": 64 * round(side / 64),
        "in_channels": config["in_channels"],
        "out_channels": 2 * config["in_channels"],
        "num_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "cross_attention_dim": config["hidden_size"],
        "caption_channels": config["caption_channels"],
        "interpolation_scale": config["pe_interpolation"],
        "use_additional_conditions": False,
    }


def _positions(model: Any, device: torch.device) -> nn.Module:
    """PixArt's patches with their positions, which are computed and stand in no file."""
    from diffusers.models.embeddings import PatchEmbed

    config = model.config
    return PatchEmbed(  # type: ignore[no-untyped-call]
        height=config.sample_size,
        width=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        embed_dim=model.inner_dim,
        interpolation_scale=config.interpolation_scale,
    ).to(device)


# --- their calls ------------------------------------------------------------------------------------------------------


def _caller(model: Any, dit: DiT, inputs: Inputs) -> Forward:
    call = {"flux": _call_flux, "sd3": _call_sd3, "pixart": _call_pixart}[dit.family](model, inputs)

    def forward() -> Tensor:
        with sdpa_kernel(FASTEST, set_priority=True):
            return call()

    return forward


def _call_flux(model: Any, inputs: Inputs) -> Forward:
    x = inputs["x"]
    rows, columns = (side // 2 for side in x.shape[-2:])
    at = torch.meshgrid(
        *(torch.arange(n, device=x.device, dtype=torch.float32) for n in (rows, columns)), indexing="ij"
    )
    image_at = functional.pad(torch.stack(at, dim=-1).flatten(0, 1), (1, 0))
    text_at = image_at.new_zeros(inputs["context"].shape[1], 3)

    def forward() -> Tensor:
        out = model(
            hidden_states=functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
            encoder_hidden_states=inputs["context"],
            pooled_projections=inputs["y"],
            timestep=inputs["timestep"],
            guidance=inputs["guidance"],
            img_ids=image_at,
            txt_ids=text_at,
            return_dict=False,
        )[0]
        return functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    return forward


def _call_sd3(model: Any, inputs: Inputs) -> Forward:
    def forward() -> Tensor:
        out = model(
            hidden_states=inputs["x"],
            encoder_hidden_states=inputs["context"],
            pooled_projections=inputs["y"],
            timestep=inputs["timestep"],
            return_dict=False,
        )[0]
        # xfuser's wrapper gives a pair, of which the other is for its pipeline.
        alone: Tensor = out[0] if isinstance(out, tuple) else out
        return alone

    return forward


def _call_pixart(model: Any, inputs: Inputs) -> Forward:
    def forward() -> Tensor:
        out: Tensor = model(
            hidden_states=inputs["x"],
            encoder_hidden_states=inputs["context"],
            timestep=inputs["timestep"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        # The other half is the predicted variance.
        return out.chunk(2, dim=1)[0]

    return forward


# --- xfuser -----------------------------------------------------------------------------------------------------------


class _Groups:
    """A layout of xfuser's groups; while it is within, xfuser goes by it."""

    def __init__(self, parallel_state: Any, process_group: Any, runtime: Any) -> None:
        self._owners = (parallel_state, process_group, runtime)
        self.values: list[dict[str, Any]] = []

    def take(self) -> list[dict[str, Any]]:
        """What xfuser goes by now."""
        names = (GROUPS, ("ULYSSES_PG", "RING_PG"), ("_RUNTIME",))
        return [
            {name: getattr(owner, name) for name in each if hasattr(owner, name)}
            for owner, each in zip(self._owners, names, strict=True)
        ]

    def put(self, values: list[dict[str, Any]]) -> None:
        """Have xfuser go by this."""
        for owner, each in zip(self._owners, values, strict=True):
            for name, value in each.items():
                setattr(owner, name, value)

    @contextmanager
    def within(self) -> Iterator[None]:
        before = self.take()
        self.put(self.values)
        try:
            yield
        finally:
            self.values = self.take()
            self.put(before)


_layouts: dict[int, _Groups] = {}


def _xfuser_groups(world_size: int, groups: int) -> _Groups:
    """Groups of xfuser's with so many along the batch; the ranks already go by those with one."""
    if groups in _layouts:
        return _layouts[groups]
    if "xfuser" not in sys.modules:
        # tacod imported some of it under bare packages; without the real ones it would import in a circle.
        del sys.modules["xfuser.core.distributed.group_coordinator"]
        importlib.import_module("xfuser")
    from xfuser.core.distributed import parallel_state, runtime_state
    from xfuser.model_executor.layers import usp
    from yunchang.globals import PROCESS_GROUP

    usp.PROCESS_GROUP = PROCESS_GROUP  # without a GPU it didn't look for it
    layout = _Groups(parallel_state, PROCESS_GROUP, runtime_state)
    before = layout.take()
    if groups > 1:
        layout.put([dict.fromkeys(each) for each in before])
        parallel_state.initialize_model_parallel(
            classifier_free_guidance_degree=groups,
            sequence_parallel_degree=world_size // groups,
            ulysses_degree=world_size // groups,
        )
    layout.values = layout.take()
    layout.put(before)
    return _layouts.setdefault(groups, layout)


def _runtime(model: Any, degree: int, split_batch: bool) -> Any:
    """The state of xfuser for a model; wrappers read it."""
    from xfuser import xFuserArgs
    from xfuser.core.distributed import runtime_state

    config, _ = xFuserArgs(model="", ulysses_degree=degree, use_cfg_parallel=split_batch).create_config()
    runtime_state.initialize_runtime_state(SimpleNamespace(transformer=model, vae_scale_factor=8), config)
    return runtime_state.get_runtime_state()


def _xfuser_flux(dit: DiT, config: Config, inputs: Inputs, degree: int, split_batch: bool) -> Forward:
    from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

    state = _runtime(_model(_class(dit), dit, config, inputs), degree, split_batch)
    state.max_condition_sequence_length = inputs["context"].shape[1]
    return _call_flux(_model(xFuserFlux1Transformer2DWrapper, dit, config, inputs), inputs)


def _xfuser_sd3(dit: DiT, config: Config, inputs: Inputs, degree: int, split_batch: bool) -> Forward:
    from xfuser.model_executor.models.transformers.transformer_sd3 import xFuserSD3Transformer2DWrapper

    model = _model(_class(dit), dit, config, inputs)
    state = _runtime(model, degree, split_batch)
    mine = _share(inputs, state, degree)
    # As its pipeline does: text that doesn't divide stays whole on every rank.
    if state.split_text_embed_in_sp and inputs["context"].shape[1] % degree == 0:
        from xfuser.core.distributed import get_sequence_parallel_rank

        mine["context"] = mine["context"].chunk(degree, dim=1)[get_sequence_parallel_rank()]
    else:
        state.split_text_embed_in_sp = False
    return _gathered(_call_sd3(xFuserSD3Transformer2DWrapper(model).forward, mine))


def _xfuser_pixart(dit: DiT, config: Config, inputs: Inputs, degree: int, split_batch: bool) -> Forward:
    from xfuser.model_executor.models.transformers.pixart_transformer_2d import xFuserPixArtTransformer2DWrapper

    model = _model(_class(dit), dit, config, inputs)
    mine = _share(inputs, _runtime(model, degree, split_batch), degree)
    return _gathered(_call_pixart(xFuserPixArtTransformer2DWrapper(model).forward, mine))


def _share(inputs: Inputs, state: Any, degree: int) -> dict[str, Any]:
    """This rank's images, and its rows of them, as xfuser's pipelines hand them out."""
    from xfuser.core.distributed import (
        get_classifier_free_guidance_rank,
        get_classifier_free_guidance_world_size,
    )

    height, width = (8 * side for side in inputs["x"].shape[-2:])
    state.set_input_parameters(height=height, width=width, batch_size=len(inputs["x"]), num_inference_steps=1)
    state.set_patched_mode(patch_mode=False)
    groups, group = get_classifier_free_guidance_world_size(), get_classifier_free_guidance_rank()
    mine = {key: value.chunk(groups)[group] for key, value in inputs.items()}
    (start, end) = state.pp_patches_start_end_idx_global[0]
    mine["x"] = mine["x"][:, :, start:end]
    return mine


def _gathered(call: Forward) -> Forward:
    from xfuser.core.distributed import get_cfg_group, get_sp_group

    def forward() -> Tensor:
        out = get_sp_group().all_gather(call().contiguous(), dim=2)
        whole: Tensor = get_cfg_group().all_gather(out, dim=0)
        return whole

    return forward
