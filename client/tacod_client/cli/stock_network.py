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
            for number, each in enumerate(outs):
                torch.save(each.float().cpu(), folder / f"{case['inputs']}.out{number}")
            answer["cases"].append({"seconds": took, "outputs": len(outs)})


def arguments(file: Path, device: Any, dtype: Any) -> dict[str, Any]:
    """The tensors of a forward: numbers for each image stay fp32, as ComfyUI passes times."""
    import torch

    def placed(tensor: Any) -> Any:
        return tensor.to(device, torch.float32 if tensor.ndim < 2 else dtype)

    given = torch.load(file, weights_only=True)
    return {
        name: [placed(each) for each in value] if isinstance(value, list) else placed(value)
        for name, value in given.items()
    }


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
