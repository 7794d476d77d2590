"""Whatever is wrong with a request's arguments is a typed error that names it, and costs nobody else anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FILL, FLUX, SD3, Daemon, unharmed

from tacod_client import ArgumentError, Client, ModelNotAllowed, ModelNotFound, ModelUnsupported, TacodError, wire
from tacod_client.exchange import converse
from tacod_client.tensors import to_wire

FORWARDS: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("x", lambda good: {"x": good["x"][:, :3]}),
    ("x", lambda good: {"x": good["x"][0]}),
    ("x", lambda good: {"x": good["x"][..., :0]}),
    ("x", lambda good: {"x": good["x"].int()}),
    ("x", lambda good: {"x": good["x"].to(torch.complex64)}),
    ("x", lambda good: {"x": None}),
    ("x", lambda good: {"x": 3.0}),
    ("context", lambda good: {"context": good["context"][..., :7]}),
    ("context", lambda good: {"context": good["context"].long()}),
    ("context", lambda good: {"context": None}),
    ("context", lambda good: {"context": [good["context"]]}),
    ("context", lambda good: {"context": "a cat"}),
    ("context", lambda good: {"context": object()}),
    ("context", lambda good: {"context": np.zeros((1, 5, 8), np.dtype("complex64"))}),
    ("context", lambda good: {"context": torch.cat([good["context"]] * 2)}),
    ("timestep", lambda good: {"timestep": good["timestep"][:0]}),
    ("timestep", lambda good: {"timestep": 0.5}),
    ("y", lambda good: {"y": good["y"][:, :5]}),
    ("y", lambda good: {"y": good["y"].long()}),
    ("guidance", lambda good: {"guidance": "3.5"}),
    ("guidance", lambda good: {"guidance": good["guidance"].repeat(2)}),
    ("ref_latents", lambda good: {"ref_latents": good["x"]}),
    ("ref_latents", lambda good: {"ref_latents": [good["x"][:, :3]]}),
    ("ref_latents_method", lambda good: {"ref_latents_method": "sideways"}),
    ("control", lambda good: {"control": good["x"]}),
    ("attention_mask", lambda good: {"attention_mask": good["x"].bool()}),
]


@pytest.mark.parametrize(("argument", "spoil"), FORWARDS, ids=lambda value: value if isinstance(value, str) else "")
def test_forward(client: Client, argument: str, spoil: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    good = FLUX.inputs()
    with unharmed(client) as model, pytest.raises(ArgumentError) as caught:
        model.forward(**{**good, **spoil(good)})
    assert caught.value.argument == argument
    assert caught.value.message.startswith(f"{argument}: ")


SAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("sigmas", {"sigmas": [1.0, float("nan"), 0.0]}),
    ("sigmas", {"sigmas": [1.0, float("inf"), 0.0]}),
    ("sigmas", {"sigmas": [0.0, 0.5, 1.0]}),
    ("sigmas", {"sigmas": [1.0, 0.5, 0.5, 0.0]}),
    ("sigmas", {"sigmas": [2.0, 1.0, 0.0]}),
    ("sigmas", {"sigmas": [1.0, 0.0, -0.1]}),
    ("sigmas", {"sigmas": [1.0]}),
    ("sigmas", {"sigmas": []}),
    ("sigmas", {"sigmas": [[1.0, 0.0]]}),
    ("sigmas", {"sigmas": np.linspace(1, 0, wire.MAX_STEPS + 2)}),
    ("sigmas", {"sigmas": np.linspace(0, 1, 1 << 22)}),
    ("sampler", {"sampler": "eulr"}),
    ("negative", {"cfg": 4.0}),
    ("cfg", {"cfg": float("nan")}),
    ("seed", {"seed": -1}),
    ("noise", {"noise": (1, 3, 8, 8)}),
    ("latent", {"latent": (1, 4, 8, 6)}),
    ("latent", {"latent": (2, 4, 8, 8)}),
    ("positive.context", {"positive": {"context": (1, 5, 7), "y": (1, 6)}}),
    ("positive.context", {"positive": {"y": (1, 6)}}),
    ("positive.guidance", {"positive": {"context": (1, 5, 8), "y": (1, 6), "guidance": (1,)}}),
    ("positive.x", {"positive": {"context": (1, 5, 8), "y": (1, 6), "x": (1, 4, 8, 8)}}),
    ("positive.timestep", {"positive": {"context": (1, 5, 8), "y": (1, 6), "timestep": (1,)}}),
    ("noise", {"noise": (0, 4, 8, 8), "latent": (0, 4, 8, 8)}),
    ("noise", {"noise": (1, 4, 26, 8), "latent": (1, 4, 26, 8)}),
    ("sigmas", {"sigmas": [1.0, 0.001, 0.0], "sampler": "uni_pc"}),
    ("negative.y", {"cfg": 4.0, "negative": {"context": (1, 5, 8), "y": (1, 7)}}),
    ("negative.context", {"cfg": 4.0, "negative": {"context": (2, 5, 8), "y": (1, 6)}}),
]


@pytest.mark.parametrize(("argument", "spoiled"), SAMPLES, ids=lambda value: value if isinstance(value, str) else "")
def test_sample(client: Client, argument: str, spoiled: dict[str, Any]) -> None:
    def ones(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ones(item) for key, item in value.items()}
        return np.ones(value, np.float32) if isinstance(value, tuple) else value

    good = {
        "noise": (1, 4, 8, 8),
        "latent": (1, 4, 8, 8),
        "sigmas": [1.0, 0.5, 0.0],
        "positive": {"context": (1, 5, 8), "y": (1, 6)},
    }
    request = ones({**good, **spoiled})
    request["sigmas"] = np.array(request["sigmas"], np.float32)
    other = client.load(SD3.file)
    with unharmed(client), pytest.raises(ArgumentError) as caught:
        other.sample(**request).result()
    assert caught.value.argument == argument
    if argument == "sampler":
        assert "euler, " in caught.value.message
        assert "heun" in caught.value.message


@pytest.mark.parametrize("channels", [9, 4])
def test_sample_of_a_model_that_takes_more_than_the_latent(client: Client, models: Path, channels: int) -> None:
    FILL.save(models)
    noise, rest = torch.zeros(1, channels, 8, 8), FILL.inputs()
    fill = client.load(FILL.file)
    before = client.status()["group"]["restarts"]
    positive = {name: rest[name] for name in ("context", "y", "guidance")}
    with unharmed(client), pytest.raises(ArgumentError, match="call forward") as caught:
        fill.sample(noise=noise, latent=noise, sigmas=torch.tensor([1.0, 0.0]), positive=positive).result()
    assert caught.value.argument == "model"
    assert client.status()["group"]["restarts"] == before
    FILL.check(fill)


@pytest.mark.parametrize("plan", ["fast", {"sequence": 7}, {"sequence": "2"}, {"cfg": 2}, {}, None, 2, [["sequence"]]])
def test_plan(client: Client, plan: Any) -> None:
    with unharmed(client), pytest.raises(ArgumentError) as caught:
        client.load(FLUX.file, plan=plan)
    assert caught.value.argument == "plan"


@pytest.mark.parametrize("dtype", ["fp64", "int8", "", 32])
def test_dtype(client: Client, dtype: Any) -> None:
    with unharmed(client), pytest.raises(ArgumentError, match="fp32") as caught:
        client.load(FLUX.file, dtype=dtype)
    assert caught.value.argument == "dtype"


KEY = "img_in.weight"


@pytest.mark.parametrize(
    ("patch", "error", "named"),
    [
        ("lora", ArgumentError, "patches[0]"),
        ({}, ArgumentError, "patches[0].key"),
        ({"key": "nowhere.weight", "kind": "diff", "diff": torch.zeros(1)}, ArgumentError, "nowhere.weight"),
        ({"key": KEY, "kind": "diff", "diff": torch.zeros(3, 3)}, ArgumentError, KEY),
        ({"key": KEY, "kind": "oft", "value": torch.zeros(3)}, ModelUnsupported, "oft"),
        ({"key": KEY, "kind": "diff", "diff": torch.zeros(80, 16), "strength": "much"}, ArgumentError, "strength"),
        ({"path": "nowhere.safetensors", "strength": 1.0}, ModelNotFound, "nowhere.safetensors"),
        ({"path": "/etc/passwd", "strength": 1.0}, ModelNotAllowed, "/etc/passwd"),
    ],
)
def test_patches(client: Client, patch: Any, error: type[TacodError], named: str) -> None:
    client.load(FLUX.file)
    with unharmed(client), pytest.raises(error, match=re.escape(named)):
        client.load(FLUX.file, patches=[patch])


@pytest.mark.parametrize("value", [b"abc", "abc", 1.5, [b"x"], {"a": b"x"}])
def test_patches_of_odd_values(client: Client, value: Any) -> None:
    """The wire takes them; a patch doesn't."""
    patch = {"key": "diffusion_model.img_in.weight", "kind": "set", "value": value}
    with unharmed(client), pytest.raises(ArgumentError) as caught:
        client.load(FLUX.file, patches=[patch])
    assert caught.value.argument.startswith("patches")


@pytest.mark.parametrize("said", [(4,), (40,), (2, 4)])
def test_a_stored_tensor_of_another_shape(client: Client, said: tuple[int, ...]) -> None:
    """From what is said of the noise levels comes the number of steps: it must be true."""
    other = client.load(SD3.file)
    levels = to_wire(np.linspace(1, 0, 8, dtype=np.float32), "sigmas").with_digest()
    client._connection.ask("put", lambda: {"tensors": [levels]})
    inputs = SD3.inputs()
    noise, _ = inputs.pop("x"), inputs.pop("timestep")
    body = {
        "model": other.id,
        "plan": "auto",
        "sampler": "euler",
        "seed": 0,
        "cfg": 1.0,
        "negative": None,
        "noise": to_wire(noise, "noise"),
        "latent": to_wire(torch.zeros_like(noise), "latent"),
        "sigmas": wire.Tensor("F32", said, None, levels.digest),
        "positive": {name: to_wire(value, name) for name, value in inputs.items()},
    }
    with unharmed(client), pytest.raises(ArgumentError, match=r"sigmas: expected|but the one of its digest is F32"):
        list(converse(client._connection, "sample", lambda: body, {}))


@pytest.mark.parametrize(("name", "needs"), [("sage", "8.0 or more"), ("int8", "7.5 or more"), ("fa3", "Hopper")])
def test_an_attention_that_ranks_can_not_compute(daemons: Callable[[int], Daemon], name: str, needs: str) -> None:
    """A forward and a run are refused by all ranks with one reason, and the ranks live on."""
    with daemons(3).client() as client:
        model = client.load(SD3.file, dtype="bf16", plan={"attention": name})
        given = SD3.inputs()
        run = {"noise": given["x"], "latent": torch.zeros_like(given["x"]), "sigmas": torch.tensor([1.0, 0.5, 0.0])}
        positive = {key: given[key] for key in ("context", "y")}
        for ask in (lambda: model.forward(**given), lambda: model.sample(**run, positive=positive).result()):
            with unharmed(client), pytest.raises(ArgumentError, match=f"ranks 0, 1, 2: this device.*{needs}") as caught:
                ask()
            assert caught.value.argument == "plan"
            assert f"attention '{name}'" in caught.value.message
