"""``tacoctl bench`` without a daemon: its inputs, what it says of a split, its table."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tacod_client.cli import bench, show
from tacod_client.errors import ArgumentError

ARGUMENTS: dict[str, dict[str, Any]] = {
    "x": {"shape": ["B", 16, "H", "W"], "required": True, "usual": True},
    "timestep": {"shape": ["B"], "required": True, "usual": True, "value": 0.7},
    "context": {"shape": ["B", "L", 32], "required": True, "usual": True},
    "y": {"shape": ["B", 8], "required": False, "usual": True},
    "guidance": {"shape": ["B"], "required": False, "usual": True, "value": 3.5},
    "c_size": {"shape": ["B", 2], "required": False, "usual": False},
}
LENGTHS = {"B": 2, "H": 12, "W": 20, "L": 7}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_inputs_have_the_shapes_and_the_bytes_of_comfyuis(dtype: str) -> None:
    shapes = bench._shapes(ARGUMENTS, LENGTHS)
    inputs = bench._inputs(ARGUMENTS, shapes, dtype)
    assert {name: value.shape for name, value in inputs.items()} == {
        "x": (2, 16, 12, 20),
        "timestep": (2,),
        "context": (2, 7, 32),
        "y": (2, 8),
        "guidance": (2,),
    }
    assert inputs["x"].dtype == inputs["context"].dtype == (np.float32 if dtype == "fp32" else np.float16)
    assert inputs["timestep"].dtype == inputs["guidance"].dtype == np.float32
    assert inputs["timestep"][0] == pytest.approx(0.7)
    assert inputs["guidance"][0] == pytest.approx(3.5)


@pytest.mark.parametrize(("shape", "value"), [(["B"], 700.0), (["B", "L"], 0.25), ([1], 0.0)])
def test_the_timestep_is_what_the_family_makes_of_it(shape: list[Any], value: float) -> None:
    """A flow by its sigma, a step of training to a thousand, a video's by frame: bench knows no family by its name."""
    arguments = {"timestep": {"shape": shape, "required": True, "usual": True, "value": value}}
    timestep = bench._inputs(arguments, bench._shapes(arguments, LENGTHS), "bf16")["timestep"]
    assert timestep.dtype == np.float32
    assert np.all(timestep == value)


def test_a_list_of_tensors_has_the_shapes_of_all() -> None:
    """As several latents; an error is the largest of theirs."""
    arguments = {
        "x": {"shape": ["B", 4], "shapes": [["B", 4], ["B", "L"]], "usual": True},
        "timestep": {"shape": ["B"], "shapes": [["B"], ["B"]], "usual": True, "value": 0.5},
    }
    inputs = bench._inputs(arguments, bench._shapes(arguments, LENGTHS), "fp32")
    assert [value.shape for value in inputs["x"]] == [(2, 4), (2, 7)]
    assert [value.tolist() for value in inputs["timestep"]] == [[0.5, 0.5]] * 2
    assert bench._error([np.ones(3), 3 * np.ones(2)], [np.ones(3), np.ones(2)]) == pytest.approx(2.0)


def test_an_output_of_zeros_has_an_error_that_is_a_number() -> None:
    zeros = np.zeros(3, np.float16)
    assert bench._error(zeros, zeros) == 0.0
    assert bench._error(zeros + 2, zeros) > 1.0


@pytest.mark.parametrize(
    ("parts", "speedup", "ranks", "said"),
    [
        ((0.0, 0.01, 0.9, 0.09, 0.0), 1.8, 2, "computing"),
        ((0.0, 0.01, 0.6, 0.39, 0.0), 1.3, 2, "the exchange between ranks"),
        ((0.0, 0.01, 0.3, 0.69, 0.0), 0.8, 2, "the exchange between ranks; one rank is faster here"),
        ((0.0, 0.4, 0.5, 0.1, 0.0), 1.1, 2, "the way between daemon and ranks"),
        ((0.0, 0.1, 0.5, 0.1, 0.3), 1.1, 2, "the client and its way to the daemon"),
        ((0.6, 0.0, 0.3, 0.1, 0.0), 1.0, 2, "other clients"),
        ((0.0, 0.0, 1.0, 0.0, 0.0), 0.99, 1, "computing"),
        ((0.0, 0.0, 0.0, 0.0, 0.0), 1.0, 1, "computing"),
    ],
)
def test_what_bounds_a_forward(parts: tuple[float, ...], speedup: float, ranks: int, said: str) -> None:
    split = {f"{part}_s": share for part, share in zip(bench.PARTS, parts, strict=True)}
    assert bench.bound(split, speedup, ranks) == said


def test_the_table_tells_a_line_for_each_size() -> None:
    times = {"p10": 0.09, "p50": 0.1, "p90": 0.11}
    row: dict[str, Any] = {
        "plan": "sequence 3 (ulysses)",
        "ranks": 3,
        "one_s": {**times, "p50": 0.25},
        "all_s": times,
        "speedup": 2.5,
        "error": 1.5e-7,
        "split": {"queue_s": 0.001, "wire_s": 0.002, "compute_s": 0.09, "collective_s": 0.007, "client_s": 0.001},
        "bound": "computing",
    }
    told = {
        "model": {"id": "ab", "name": "flux.safetensors", "family": "flux", "dtype": "bf16"},
        "batch": 1,
        "text": 512,
        "ranks": 3,
        "rounds": 10,
        "sizes": [{**row, "size": "1024x1024"}, {**row, "size": "2048x2048"}],
    }
    output = io.StringIO()
    Console(file=output, width=200).print(show.bench(told))
    lines = output.getvalue().splitlines()
    for size in ("1024x1024", "2048x2048"):
        (line,) = (line for line in lines if line.startswith(size) and "250.0 ms" in line)
        assert all(word in line for word in ("100.0 ms", "2.50", "1.5e-07", "90.0 ms", "7.0 ms", "computing"))
    assert any("flux.safetensors, flux, bf16" in line for line in lines)
    assert any("3 ranks" in line for line in lines)


@pytest.mark.parametrize("groups", [{}, {"groups": ["0"]}])
def test_without_a_name_it_takes_the_model_that_was_used_last(groups: dict[str, Any]) -> None:
    """Several groups tell theirs one after the other, so that only a single model is the last one."""
    told = [{"id": "a1", "name": "flux.safetensors", **groups}, {"id": "b2", "name": "sd3.safetensors", **groups}]
    client: Any = SimpleNamespace(models=lambda: told, model=lambda known: known)
    if groups:
        with pytest.raises(ArgumentError, match=r"name the one .*: a1 \(flux\.safetensors\), b2 \(sd3\.safetensors\)$"):
            bench._find(client, None, True)
        del told[1:]
    assert bench._find(client, None, True) == told[-1]["id"]
