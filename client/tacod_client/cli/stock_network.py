"""A program for ComfyUI's own interpreter: forwards of ComfyUI's network with a model file, timed.

It reads a request as JSON from its input and writes an answer as JSON to a file. It imports nothing of tacod, which
that interpreter needn't have. ``tacoctl bench`` starts it (`tacod_client.cli.beside`).
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer one request: times and outputs, or what stood in the way."""
    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    answer: dict[str, Any] = {}
    try:
        measure(request, folder, answer)
    except Exception as error:
        lacking = "out of memory" in str(error).lower() or type(error).__name__ == "OutOfMemoryError"
        lines = str(error).strip().splitlines() or ["no word"]
        answer |= {"kind": "memory" if lacking else "error", "error": f"{type(error).__name__}: {lines[0]}"}
    (folder / "answer.json").write_text(json.dumps(answer))


def measure(request: dict[str, Any], folder: Path, answer: dict[str, Any]) -> None:
    """Load the file as ComfyUI's loader node does, and time forwards of each case."""
    sys.path.insert(0, request["comfyui"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = request["cpu"]
    import comfy.model_management as management
    import comfy.sd
    import torch
    from safetensors.torch import save_file

    load = getattr(comfy.sd, "load_diffusion_model", None)
    if load is None:
        raise RuntimeError("it has no comfy.sd.load_diffusion_model; it is too old to compare with")
    options = {"dtype": getattr(torch, request["dtype"])} if request["dtype"] else {}
    with torch.inference_mode():
        patcher = load(request["file"], model_options=options)
        management.load_models_gpu([patcher], force_full_load=True)
        model, device = patcher.model, patcher.load_device
        dtype = model.get_dtype_inference() if hasattr(model, "get_dtype_inference") else model.get_dtype()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        answer |= {"device": name, "dtype": str(dtype).removeprefix("torch."), "cases": []}
        for case in request["cases"]:
            given = arguments(folder / case["inputs"], device, dtype)
            took, out = timed(model.diffusion_model, given, device, request["warm_ups"], request["rounds"])
            outs = out if isinstance(out, (list, tuple)) else [out]
            named = {str(number): each.float().cpu().contiguous() for number, each in enumerate(outs)}
            save_file(named, folder / f"{case['inputs']}.out")
            answer["cases"].append({"seconds": took})


def arguments(file: Path, device: Any, dtype: Any) -> dict[str, Any]:
    """The tensors of a forward: numbers for each image stay fp32, as ComfyUI passes times.

    Those of a list have their places behind their name, as in ``x.0``.
    """
    import torch
    from safetensors.torch import load_file

    def placed(tensor: Any) -> Any:
        return tensor.to(device, torch.float32 if tensor.ndim < 2 else dtype)

    tensors = {name: placed(tensor) for name, tensor in load_file(file).items()}
    given = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for key in {name.partition(".")[0] for name in tensors.keys() - given.keys()}:
        count = sum(name.startswith(f"{key}.") for name in tensors)
        given[key] = [tensors[f"{key}.{place}"] for place in range(count)]
    return given


def timed(network: Any, given: dict[str, Any], device: Any, warm_ups: int, rounds: int) -> tuple[list[float], Any]:
    """The seconds of so many forwards, and the last output."""
    import torch

    x, timestep = given.pop("x"), given.pop("timestep")
    asks = inspect.signature(network.forward).parameters
    if "num_tokens" in asks and "num_tokens" not in given:
        given["num_tokens"] = given["context"].shape[1]
    took, out = [], None
    for number in range(warm_ups + rounds):
        # Some networks change the list that they get.
        latents = list(x) if isinstance(x, list) else x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        out = network(latents, timestep, **given, transformer_options={})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warm_ups:
            took.append(time.perf_counter() - started)
    return took, out


if __name__ == "__main__":
    main()
