"""A model of two latents through the client: lists of them go in and come out, of forwards and of sampling runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, Daemon, package_with, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

from tacod_client import ArgumentError, Model
from tacod_client.cli import main

ENGINE = Path(__file__).parents[1] / "engine"
sys.path.append(str(ENGINE))
from made_up import CONFIG, expected, inputs, model  # noqa: E402

SIGMAS = torch.tensor([1.0, 0.6, 0.0])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon of three ranks that knows the family, and its model."""
    folder = tmp_path_factory.mktemp("pairs")
    weights = {key: weight.contiguous() for key, weight in model("pair").state_dict().items()}
    config = {**CONFIG, "image_model": "made_up_pair"}
    save_file(weights, folder / "pair.safetensors", metadata={"tacod.config": json.dumps(config)})
    daemon = Daemon(3, [folder])
    daemon.start_folder = package_with(ENGINE / "made_up_pair.py", tmp_path_factory.mktemp("package"))
    with daemon:
        yield daemon


@pytest.fixture
def pair(pairs: Daemon) -> Iterator[Model]:
    with pairs.client() as client:
        yield client.load("pair.safetensors")


def conditions() -> dict[str, Any]:
    given = inputs("pair_bare")
    noise, latent = inputs("pair_bare", seed=5)["x"], [0.3 * each for each in given["x"]]
    return {"noise": noise, "latent": latent, "positive": {"context": given["context"]}}


@pytest.mark.parametrize("case", ["pair", "pair_bare"])
def test_a_forward(pair: Model, case: str) -> None:
    """Of torch tensors in a list or a tuple, or of arrays; with masks and a time for each token of each latent."""
    given = inputs(case)
    out = pair.forward(**given)
    for one, other in zip(out, expected(case, given), strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other) <= FP32
    again = pair.forward(**{**given, "x": tuple(given["x"]), "timestep": tuple(given["timestep"])})
    assert all(map(torch.equal, again, out))
    arrays = pair.forward(**{**given, "x": [each.numpy() for each in given["x"]]})
    assert all(torch.equal(torch.from_numpy(one), other) for one, other in zip(arrays, out, strict=True))
    halved = pair.forward(**{**given, "x": [given["x"][0].bfloat16(), given["x"][1]]})
    assert [each.dtype for each in halved] == [torch.bfloat16, torch.float32]
    assert pair.stats.last is not None
    assert pair.stats.last.ranks == 3


def test_a_run(pair: Model, pairs: Daemon) -> None:
    """On one rank and on three it comes to the same, in steps of one's own too."""
    given = conditions()
    job = pair.sample(**given, sigmas=SIGMAS)
    assert [event.step for event in job] == [1, 2]
    out = job.result()
    assert [each.shape for each in out] == [each.shape for each in given["noise"]]
    with pairs.client() as client:
        alone = client.load("pair.safetensors", plan={"sequence_parallel_degree": 1, "cfg_parallel": False})
        for one, other in zip(alone.sample(**given, sigmas=SIGMAS).result(), out, strict=True):
            assert relative_error(one, other) <= 10 * FP32
    arrays = {key: [each.numpy() for each in given[key]] for key in ("noise", "latent")}
    for one, other in zip(pair.sample(**{**given, **arrays}, sigmas=SIGMAS).result(), out, strict=True):
        assert torch.equal(torch.from_numpy(one), other)


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("x", inputs("pair")["x"][0], "expected a list of tensors"),
        ("x", inputs("pair")["x"][:1], "expected a list of 2 tensors"),
        ("x", [], "nor a list of such"),
        ("x", [inputs("pair")["x"][0], None], "nor a list of such"),
        ("timestep", inputs("pair")["timestep"][0], "expected a list of tensors"),
        ("timestep", [each[..., 0] for each in inputs("pair")["timestep"]], r"\[B\] or \[B, N, 1\]"),
        ("denoise_mask", inputs("pair")["denoise_mask"][..., :3], "its W is 3, but that of x is 4"),
    ],
)
def test_a_forward_that_is_refused(pair: Model, argument: str, value: Any, told: str) -> None:
    with pytest.raises(ArgumentError, match=told) as caught:
        pair.forward(**{**inputs("pair"), argument: value})
    assert caught.value.argument == argument
    assert len(pair.forward(**inputs("pair"))) == 2


def test_a_run_that_is_refused(pair: Model) -> None:
    given = conditions()
    noise: list[Tensor] = given["noise"]
    refused = {
        "nor a list of such": [],
        "expected a list of tensors": noise[0],
        "expected a list of 2 tensors": [*noise, noise[0]],
        "a list of at most 16 tensors": 17 * noise[:1],
        "its S is 7, but that of noise is 4": [noise[0], noise[1][:, :, :4]],
    }
    for told, value in refused.items():
        with pytest.raises(ArgumentError, match=told):
            pair.sample(**{**given, "noise": value}, sigmas=SIGMAS).result()


def test_tacoctl(pair: Model, pairs: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``sample`` takes noise of one's own for each latent; ``bench`` and ``plan`` make latents of usual sizes."""
    given = conditions()
    file, output = tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"
    tensors = {"positive.context": given["positive"]["context"], "sigmas": SIGMAS}
    save_file(tensors, file)
    sample = ["--endpoint", pairs.endpoint, "sample", pair.id, str(file), "--cfg", "1", "--output", str(output)]
    assert main(sample) == 1
    assert "put noise.0, noise.1" in capsys.readouterr().err
    for name in ("noise", "latent"):
        tensors |= {f"{name}.{index}": each.contiguous() for index, each in enumerate(given[name])}
    save_file(tensors, file)
    assert main(sample) == 0
    made, out = load_file(output), pair.sample(**given, sigmas=SIGMAS).result()
    assert made.keys() == {"latent.0", "latent.1"}
    assert torch.equal(made["latent.0"], out[0])
    assert torch.equal(made["latent.1"], out[1])
    # It computes in a program of the daemon's, which knows the family in its own folder alone.
    script = "import sys; from tacod_client.cli import main; sys.exit(main())"
    bench = ["--endpoint", pairs.endpoint, "--json", "bench", pair.id, "--size", "64x64", "--rounds", "1"]
    command = [sys.executable, "-c", script, *bench]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pairs.start_folder, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sizes"][0]["error"] <= FP32
