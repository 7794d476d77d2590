"""Made-up families, which together use all of the kit, against plain PyTorch in every layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import made_up_video
import pytest
import torch
from helpers import FP32, relative_error
from made_up import CASES, CONFIG, KINDS, engine_of, error, expected, inputs, model, packed
from made_up_joint import Joint
from made_up_video import Video
from rank_worker import LAYOUTS, WORLD, Ranks
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import read_checkpoint
from tacod.plan import DeviceRates, Layout, Plan, Shape
from tacod.rank.engine import Engine
from tacod.rank.families import families
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.names import Place
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call
from tacod.rank.forward.warmup import Measured, usual_inputs, warm_up
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.fp8 import quantize_blocks
from tacod.shares import EQUAL, Shares
from tacod_client.errors import ArgumentError
from tacod_client.tensors import from_wire

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_operations(case: str) -> None:
    assert error(Topology(), Layout(1, 1, 1), case) <= FP32


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_operations_in_every_layout(ranks: Ranks, case: str, layout: tuple[int, ...]) -> None:
    errors = ranks.run(layout, "made_up", case=case, batch=max(2, layout[0]))
    assert len(errors) == WORLD, "an idle rank gets the output too"
    assert max(errors) <= FP32


def answer(made: DiT, given: dict[str, Any], plan: Any = "auto") -> list[Tensor]:
    """What an engine of one rank gives a client."""
    return sent_by(engine_of(made, Topology()), given, plan)


def sent_by(engine: Engine, given: dict[str, Any], plan: Any = "auto") -> list[Tensor]:
    with torch.inference_mode():
        out = engine.forward("m", plan, packed(given), b"session").out
    return [from_wire(each, "torch") for each in (out if isinstance(out, list) else [out])]


@pytest.mark.parametrize("case", ["video", "joint"])
def test_a_key_mask_comes_in_any_dtype(case: str) -> None:
    """Integers are true if not 0; floats are added to scores, so 0 counts."""
    given = inputs(case)
    keys = given["attention_mask"]
    (wanted,) = expected(case, given)
    for mask in (keys.long(), keys.int(), torch.zeros(keys.shape).masked_fill(~keys, -torch.inf)):
        (out,) = answer(model(case), {**given, "attention_mask": mask})
        assert relative_error(out, wanted) <= FP32


def test_a_mask_of_floats_that_are_0_and_1_is_refused() -> None:
    """As what is added to scores it would hide the tokens that count, and show the others."""
    given = inputs("video")
    with pytest.raises(ArgumentError, match="attention_mask: floats are added to scores"):
        answer(model("video"), {**given, "attention_mask": given["attention_mask"].float()})


def test_text_that_no_image_sees_is_not_computed() -> None:
    given, made = inputs("joint_masks"), model("joint")
    prepared = made.prepare(Inputs(given, made.arguments()))
    seen = int(given["attention_mask"][0].sum())
    assert seen < given["context"].shape[1]
    assert prepared["context"].shape[1] == seen
    assert "attention_mask" not in prepared, "attention needs no mask then"
    assert made.lengths(prepared)[0] == seen
    apart = made.prepare(Inputs(inputs("joint"), made.arguments()))
    assert "attention_mask" in apart, "the images differ"
    assert len({prepared.key, apart.key, Inputs(given, made.arguments()).key}) == 3, "each has a CUDA graph of its own"


def test_several_latents_must_be_those_that_the_model_takes() -> None:
    given, made = inputs("pair"), model("pair")
    video, sound = given["x"]
    for x, told in (
        ([video], "got 1 tensors"),
        ([sound, video], "expected shape"),
        ([video, sound[:1]], "its B is 1, but that of x is 2"),
        ([video[:1], sound[:1]], "context: its B is 2, but that of x is 1"),
    ):
        with pytest.raises(ArgumentError, match=told):
            answer(made, {**given, "x": x})


@pytest.mark.parametrize("name", KINDS)
def test_warms_up(name: str) -> None:
    made = model(name)
    usual = usual_inputs(made, torch.device("cpu"))
    assert usual is not None
    assert set(usual) == {key for key, spec in made.arguments().items() if spec.required}
    assert all(each.dtype == torch.float32 for each in usual.timesteps)
    shapes = made.output_shapes([tuple(each.shape) for each in usual.latents])
    with torch.inference_mode():
        out = Forwards(Topology())(Call(made, Plan(Layout(1, 1, 1), 1, Shape(made.heads, made.width)), usual))
    assert [tuple(each.shape) for each in (out if isinstance(out, list) else [out])] == shapes
    measured = warm_up(made, Forwards(Topology()), torch.device("cpu"))
    assert measured == (None, EQUAL), "one rank alone has no rates to measure"
    known = Measured(DeviceRates(1e12, 1e9, 1e-3), Shares.of([2, 1], measured=True))
    assert warm_up(made, Forwards(Topology()), torch.device("cpu"), known=known) == known


@pytest.mark.parametrize("name", KINDS)
def test_the_blocks_are_multiplied_in_8_bits(name: str) -> None:
    made = model(name)
    quantize_blocks(made)
    narrow = {each for each, layer in made.named_modules() if isinstance(layer, Fp8Linear)}
    blocks = "layers" if name == "joint" else "blocks"
    assert narrow
    assert all(each.startswith(f"{blocks}.") and "modulation" not in each for each in narrow)
    for one, other in zip(answer(made, inputs(name)), expected(name, inputs(name)), strict=True):
        assert 1e-4 < relative_error(one, other) < 0.3


@pytest.mark.parametrize("name", KINDS)
def test_steps_are_skipped(name: str) -> None:
    """The step cache moves every latent; a ControlNet's residuals would forbid it."""
    given = {key: value for key, value in inputs(name).items() if key != "control"}
    engine = engine_of(model(name), Topology())
    outs = [sent_by(engine, given, {"step_cache": 0.1}) for _ in range(2)]
    assert engine.forwards.skipped == 1
    for one, other in zip(*outs, strict=True):
        assert relative_error(one, other) <= FP32


def test_a_file_is_read_under_each_of_its_names(tmp_path: Path) -> None:
    """Ours, ComfyUI's other spelling, and diffusers'."""
    files: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for name in ("video", "joint"):
        files[name] = name, dict(model(name).state_dict())
    layout = Video.diffusers_layout(CONFIG)
    assert {place.key for place in layout.values()} == set(files["video"][1]), "every parameter has its name there"
    theirs = {their: _placed(files["video"][1][place.key], place) for their, place in layout.items()}
    files["diffusers"] = "video", theirs
    respelt = {key.replace("_norm.scale", "_norm.weight"): each for key, each in files["joint"][1].items()}
    assert set(respelt) != set(files["joint"][1])
    files["respelt"] = "joint", respelt
    with mock.patch("tacod.rank.families.families", return_value=(Video, Joint)):
        for file, (name, tensors) in files.items():
            path = str(tmp_path / f"{file}.safetensors")
            save_file({key: each.contiguous().clone() for key, each in tensors.items()}, path)
            engine = Engine(torch.device("cpu"), Topology())
            engine.load("m", path, read_checkpoint(path).identity, "fp32", None, None, [])
            (out,), (wanted,) = sent_by(engine, inputs(name)), expected(name, inputs(name))
            assert relative_error(out, wanted) <= FP32, file


def _placed(tensor: Tensor, place: Place) -> Tensor:
    tensor = tensor if place.rows is None else tensor.narrow(0, *place.rows)
    return torch.cat(tensor.chunk(2)[::-1]) if place.swap else tensor


def test_made_up_families_are_not_the_packages() -> None:
    assert not {kind.family for kind in KINDS.values()} & {kind.family for kind in families()}


def test_the_page_shows_a_family_as_it_is() -> None:
    page = (ROOT / "docs" / "adding-a-family.md").read_text()
    (shown,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert shown == Path(made_up_video.__file__).read_text()
