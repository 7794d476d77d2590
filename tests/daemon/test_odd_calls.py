"""Odd loads, forwards and sampling runs of every family, many of them: each is answered, and no rank is lost.

`TACOD_ODD_CALLS` says how many there are to be.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FILL, FLUX, PIXART, SD3, Daemon, Tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tacod.rank.sampling.samplers import SAMPLERS
from tacod_client import Client, EngineError, Model, TacodError, Unavailable
from tacod_client.errors import ConnectionFailed

CALLS = int(os.environ.get("TACOD_ODD_CALLS", "90"))
TINIES = {tiny.name: tiny for tiny in (FLUX, SD3, PIXART, FILL)}
ODD_FILE = "odd.safetensors"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
FILLS = [0.0, 1.0, -1.0, 0.7, 1e-30, 1e30, float("nan"), float("inf")]
CONDITIONS = ["context", "y", "guidance", "c_size", "c_ar", "ref_latents", "ref_latents_method", "attention_mask"]
CONDITIONS += ["rope_options", "rope_options_for", "qk_norm_eps", "control", "x", "timestep", "noise", "sequence"]
CONDITIONS += ["step_cache", "self", "dit", "plan", "store", ""]

dtypes = st.sampled_from(DTYPES[:3]) | st.sampled_from(DTYPES)
sides = st.integers(1, 9) | st.sampled_from([0, 2, 4, 8, 9, 34, 36])
numbers = st.sampled_from([0, 1, -1, 2, 0.5, 1e-6, 1e5, 1e300, -0.0, 2**63 - 1, True]) | st.floats(width=32)
words = st.sampled_from(["", "index", "uxo", "offset", "all", "image", "auto", "a cat", "\x00", "é" * 300])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any small tensor, mostly of one image or two."""
    shape = draw(
        st.lists(sides, max_size=5)
        | st.tuples(st.integers(1, 2), st.just(4), sides, sides)
        | st.tuples(st.integers(1, 2), sides, st.just(8))
        | st.tuples(st.integers(1, 3))
        | st.sampled_from([(1, 6), (2, 6), (1, 2), (2, 1), (1, 41, 41), (2, 5, 5)])
    )
    return torch.full(list(shape), draw(st.sampled_from(FILLS))).to(draw(dtypes))


maps = st.dictionaries(
    st.sampled_from(["scale_x", "scale_y", "shift_t", "tensors", "input", "output", "middle", "a"]),
    numbers | st.lists(st.none() | tensors(), max_size=3) | words,
    max_size=3,
)
values = tensors() | numbers | words | maps | st.lists(tensors(), max_size=3) | st.none()
plans = st.just("auto") | st.dictionaries(
    st.sampled_from(["sequence_parallel_degree", "cfg_parallel", "ulysses", "ring", "flash_attention", "exchange"])
    | st.sampled_from(["step_cache", "batch", "attention"]),
    st.sampled_from([1, 2, 3, True, False, "int8", "exact", "sage", 0.1, 1e300, -1, None]),
    max_size=3,
)
levels = st.lists(st.sampled_from([14.0, 1.0, 0.9, 0.5, 0.1, 0.001, 1e-4, 1e-30, 0.0, -1.0, float("nan")]), max_size=4)
falling = levels.map(lambda each: sorted({abs(level) for level in each if level == level}, reverse=True))
conditions = st.dictionaries(st.sampled_from(CONDITIONS), values, max_size=2)


@dataclass
class Call:
    """One call: of which kind, of which model or file, by which plan, with what."""

    kind: str
    of: Any
    plan: Any
    asked: dict[str, Any]
    file: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def __repr__(self) -> str:
        file = "" if self.file is None else f" file {_brief(self.file)}"
        return f"<{self.kind} {getattr(self.of, 'name', self.of)!r} plan {self.plan} {_brief(self.asked)}{file}>"


def _brief(value: Any) -> Any:
    """A call's values with their tensors by dtype, shape and first number."""
    if isinstance(value, dict):
        return {name: _brief(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_brief(each) for each in value]
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)} {value.float().flatten()[:4].tolist()}"
    return value


@st.composite
def sizes(draw: st.DrawFn, tiny: Tiny) -> dict[str, Any]:
    """A forward's arguments as they should be, of one size or another."""
    size = (34, 36) if tiny is PIXART else draw(st.sampled_from([(9, 14), (1, 1), (2, 7)]))
    return tiny.inputs(0, draw(st.integers(1, 2)), draw(st.sampled_from([1, 5, 33])), size)


@st.composite
def forwards(draw: st.DrawFn) -> Call:
    """A forward with none, one or two odd arguments."""
    tiny = draw(st.sampled_from(list(TINIES.values())))
    return Call("forward", tiny, draw(plans), {**draw(sizes(tiny)), **draw(conditions | st.just({}))})


@st.composite
def samples(draw: st.DrawFn) -> Call:
    """A run of a few steps, in which something is odd or nothing."""
    tiny = draw(st.sampled_from(list(TINIES.values())))
    positive = draw(sizes(tiny))
    noise = positive.pop("x")
    del positive["timestep"]
    negative = draw(st.none() | st.just(positive) | sizes(tiny).map(lambda each: _without(each, ("x", "timestep"))))
    good = {
        "noise": noise,
        "latent": torch.zeros_like(noise),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "positive": positive,
        "negative": negative,
        "cfg": 1.0 if negative is None else 3.5,
        "sampler": draw(st.sampled_from(sorted(SAMPLERS))),
        "seed": 0,
    }
    odd = {
        "noise": tensors(),
        "latent": tensors() | st.just(noise),
        "sigmas": (falling | levels).map(torch.tensor),
        "positive": conditions.map(lambda more: {**positive, **more}),
        "negative": conditions.map(lambda more: {**positive, **more}),
        "cfg": st.sampled_from([0.0, -1.0, 1e38, 1e300, 1.0 + 1e-12]),
        "sampler": words,
        "seed": st.sampled_from([1, 2**63, 2**64 - 1, 2**64, -1]),
    }
    asked = {**good, **{name: draw(odd[name]) for name in draw(st.sets(st.sampled_from(sorted(odd)), max_size=2))}}
    return Call("sample", tiny, draw(plans), asked)


def _without(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


@st.composite
def patches(draw: st.DrawFn, tiny: Tiny) -> Any:
    """A weight patch, more or less."""
    weights = sorted(tiny.model.state_dict())
    key = draw(st.sampled_from(weights) | words)
    kind = draw(st.sampled_from(["lora", "loha", "lokr", "diff", "set", "oft", ""]))
    patch: dict[str, Any] = {"key": key, "kind": kind}
    names = ["up", "down", "mid", "alpha", "dora_scale", "w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2", "diff"]
    names += ["value", "pad_weight", "strength", "strength_model", "offset", "function", "reshape", "path"]
    patch |= draw(st.dictionaries(st.sampled_from(names), values, max_size=3))
    if kind == "diff" and draw(st.booleans()) and key in weights:
        patch = {
            "key": key,
            "kind": kind,
            "diff": torch.full_like(tiny.model.state_dict()[key], draw(numbers_of_weights)),
        }
    return patch


numbers_of_weights = st.sampled_from([0.0, 0.1, float("nan")])


@st.composite
def loads(draw: st.DrawFn) -> Call:
    """A load of a good file or an odd one."""
    tiny = draw(st.sampled_from(list(TINIES.values())))
    odd_file = draw(st.none() | files(tiny))
    path = ODD_FILE if odd_file is not None else draw(st.just(tiny.file) | words)
    asked = {
        "dtype": draw(st.sampled_from([None, "fp32", "bf16", "fp16", "fp8", "fp64"])),
        "patches": draw(st.none() | st.lists(patches(tiny), max_size=2)),
    }
    return Call("load", path, draw(plans), asked, odd_file)


@st.composite
def files(draw: st.DrawFn, tiny: Tiny) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's weights and what it says of itself; both may be odd."""
    state = dict(tiny.model.state_dict())
    config = {**tiny.config}
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(sorted(state)))
        change = draw(st.sampled_from(["gone", "cut", "dtype", "more"]))
        if change == "gone":
            del state[key]
        elif change == "cut":
            state[key] = state[key].flatten()[:-1].clone()
        elif change == "dtype":
            state[key] = state[key].to(draw(dtypes))
        else:
            state[draw(words) + key] = torch.ones(2)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*config, "patch_size", "qkv_bias", "depth", "theta", "mlp_ratio", "pe_precision"]))
        config[key] = draw(numbers | words | st.none() | st.lists(st.integers(-1, 9), max_size=3))
    return state, config


class Callee:
    """The daemon with a model of each family, and what came of each call."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.folder = folder
        for tiny in TINIES.values():
            tiny.save(folder)
        self.daemon = daemon
        self.ends: Counter[str] = Counter()
        self.client: Client
        self.models: dict[str, Model]

    def start(self) -> None:
        self.client = self.daemon.client(reconnect_s=5)
        self.models = {name: self.client.load(tiny.file) for name, tiny in TINIES.items()}
        self.restarts = self.client.status()["group"]["restarts"]

    def make(self, call: Call) -> str:
        """Make a call, and return what came of it."""
        end = "result"
        try:
            self._make(call)
        except (EngineError, Unavailable, ConnectionFailed):
            raise
        except TacodError as error:
            end = type(error).__name__
        self.ends[f"{call.kind}: {end}"] += 1
        return end

    def _make(self, call: Call) -> None:
        if call.kind == "load":
            if call.file is not None:
                weights = {name: tensor.contiguous().clone() for name, tensor in call.file[0].items()}
                save_file(weights, self.folder / ODD_FILE, {"tacod.config": json.dumps(call.file[1])})
            self.client.load(call.of, plan=call.plan, **call.asked)
            return
        loaded = self.models[call.of.name]
        model = Model(self.client._connection, replace(loaded._load, plan=call.plan), {**vars(loaded)})
        if call.kind == "forward":
            model.forward(**call.asked)
        else:
            model.sample(**call.asked).result()


@pytest.fixture(scope="module")
def callee(daemons: Callable[[int], Daemon], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callee]:
    callee = Callee(daemons(2), tmp_path_factory.mktemp("odd"))
    with callee.daemon.changed({"models.roots": [str(callee.folder)]}):
        callee.start()
        yield callee
        callee.client.close()


@pytest.mark.timeout(60 + CALLS)
@settings(max_examples=CALLS, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(call=samples() | loads() | samples() | forwards())
def test_each_is_answered(callee: Callee, call: Call) -> None:
    """By a result, or by an error that names what is wrong with it."""
    callee.make(call)


def test_afterwards_no_rank_was_lost_and_forwards_are_right(callee: Callee) -> None:
    assert callee.client.status()["group"]["restarts"] == callee.restarts
    print(dict(sorted(callee.ends.items())))
    assert callee.ends["sample: result"]
    assert callee.ends["load: result"]
    assert callee.ends["forward: result"]
    for tiny in (FLUX, SD3):
        tiny.check(callee.client.load(tiny.file))
