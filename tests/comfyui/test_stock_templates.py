"""ComfyUI's own workflow templates, with our loader behind theirs: each does as without it, or is refused by name.

Of each template's graph this runs what its samplers depend on. Files that one has to download, pictures and sizes are
stand-ins; the nodes, their links and their values are the template's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import Pair
from comfyui_server import ComfyUI, Graph, Outcome
from template_cuts import SOURCES, cuts, error
from template_models import SIDE, Model

Both = Callable[..., Outcome]

HONOURED = {
    *("BasicGuider", "CFGGuider", "DualCFGGuider", "LTXVDualCFGGuider", "LTXVReferenceAudio", "CFGZeroStar"),
    *("KSampler", "KSamplerAdvanced", "SamplerCustom", "EasyCache", "ScaleROPE", "UNetTemporalAttentionMultiply"),
    *("BasicScheduler", "BetaSamplingScheduler"),
    *("ModelSamplingAuraFlow", "ModelSamplingFlux", "ModelSamplingSD3"),
    *("CFGNorm", "DifferentialDiffusion", "ChromaRadianceOptions", "LoraLoaderModelOnly", "ComfySwitchNode"),
    *("LoraLoader", "GetICLoRAParameters"),
}
"""Nodes that are handed a MODEL and do with ours what they do with ComfyUI's."""
REFUSED = {
    "QwenImageDiffsynthControlnet": "patches of '(noise_refiner', ')?double_block' "
    r"\((ZImageControl|DiffSynthCnet)Patch,",
    "AnimaLLLiteApply": "patches of 'post_input', 'attn1_patch', 'attn2_patch', 'mlp_patch' "
    r"\(AnimaLLLiteAttentionPatch, AnimaLLLiteMLPPatch, AnimaLLLitePatch,",
    "USOStyleReference": r"patches of 'post_input' \(UsoStyleProjectorPatch,",
    "SkipLayerGuidanceDiT": r"SkipLayerGuidanceDiT\.execute\.<locals>\.post_cfg_function",
    "WanInfiniteTalkToVideo": r"patches of ",
    "FluxKVCache": r"a replacement of diffusion_model\.params\.default_ref_method",
}
"""Nodes that put code into the network, and what the refusal calls it."""

EFFECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "CFGNorm": ("qwen_edit", {"strength": 1.0}),
    "DifferentialDiffusion": ("krea2", {}),
    "ModelSamplingAuraFlow": ("z_image", {"shift": 7.0}),
    "ModelSamplingFlux": ("krea2", {"max_shift": 2.0, "base_shift": 0.3, "width": 512, "height": 512}),
    "ModelSamplingSD3": ("hidream", {"shift": 6.0}),
}
"""A tiny model and values with which these change the result, if the loader doesn't drop what they put on a MODEL."""


@pytest.fixture(autouse=True)
def _there_are_templates(comfyui: ComfyUI) -> None:
    if not any(True for _ in cuts(comfyui)):
        pytest.skip("this ComfyUI has no package of templates")


def test_what_becomes_of_every_node_on_the_way_is_known(comfyui: ComfyUI) -> None:
    kinds = {kind: cut.template.name for cut in cuts(comfyui) for kind in cut.kinds}
    assert {kind: name for kind, name in kinds.items() if kind not in {*HONOURED, *REFUSED}} == {}


@pytest.mark.parametrize("golden", SOURCES)
def test_each_template_runs_or_is_refused_by_name(comfyui: ComfyUI, comfyui_models: Path, golden: str) -> None:
    of_family = {cut.shape: cut for cut in cuts(comfyui) if golden in cut.goldens}
    if not of_family:
        pytest.skip("this version's templates have none of the family")
    model = Model(golden, comfyui_models)
    both: Graph = {}
    run = []
    for cut in of_family.values():
        refusals = [pattern for kind, pattern in REFUSED.items() if kind in cut.kinds]
        if refusals:
            outcome = comfyui.run(cut.graph(model, "taco"))
            assert outcome.kind == "error", cut.template.name
            assert re.match(f"TACO-DiT can't honour {refusals[0]}", outcome.error), (cut.template.name, outcome.error)
            assert max((event["value"] for event in outcome.of("progress") if event["max"] < 100), default=0) == 0
        honoured = cut.without(REFUSED)
        if honoured is not None:
            run.append(honoured)
            both |= honoured.graph(model, "stock") | honoured.graph(model, "taco")
    if not run:
        return
    outcome = comfyui.run(both)
    assert outcome.kind == "success", outcome.error
    errors = {(cut.template.name, cut.sampler): error(comfyui, cut, model) for cut in run}
    assert {name: each for name, each in errors.items() if not each <= 1e-5} == {}


@pytest.mark.parametrize("kind", EFFECTS)
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_nodes_on_either_side_of_the_loader_have_their_effect(
    comfyui: ComfyUI, both: Both, comfyui_models: Path, kind: str, before: bool
) -> None:
    golden, values = EFFECTS[kind]
    model = Model(golden, comfyui_models)
    # It has of `TinyModel` what a graph asks for.
    run = Pair(model.sizes)  # type: ignore[arg-type]
    for name in ("positive", "negative"):
        run.nodes[name]["inputs"] |= model.beside
    run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    run.add("mask", "TestMask", height=SIDE, width=SIDE)
    run.add("soft", "FeatherMask", mask="@mask", left=120, top=0, right=0, bottom=0)
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@soft")
    how = {"denoise": 0.8, "latent_image": "@masked"}
    if before:
        run.sample(save="_plain", **how)
        run.on_model(kind, **values)
        run.load()
    else:
        run.load()
        run.sample(save="_plain", **how)
        run.on_model(kind, **values)
    run.sample(**how)
    both(run, "")
    plain, changed = (comfyui.latent(run.file("taco", save)) for save in ("_plain", ""))
    assert (changed - plain).norm() > 1e-3 * plain.norm()
