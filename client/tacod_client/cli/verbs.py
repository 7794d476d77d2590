"""What each verb of ``tacoctl`` does."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tacod_client.cli import bench, doctor, install, keygen, show, top
from tacod_client.client import Client, Model
from tacod_client.errors import ConnectionFailed, ModelNotFound, RequestError
from tacod_client.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Run the verb that ``args`` names; returns the exit code."""
    code = _VERBS[args.verb](args)
    return code or 0


def _print(args: argparse.Namespace, value: Any, text: Callable[[Any], Any]) -> None:
    if "json" in args:
        print(json.dumps(value, indent=None if args.watch else 2, ensure_ascii=False), flush=True)
    else:
        show.out(text(value))


def _client(args: argparse.Namespace) -> Client:
    return Client(getattr(args, "endpoint", None))


def _watched(args: argparse.Namespace, ask: Callable[[Client], Any], text: Callable[[Any], Any]) -> None:
    with _client(args) as client:
        if args.watch is None:
            _print(args, ask(client), text)
        elif "json" in args or not sys.stdout.isatty():
            while True:
                _print(args, ask(client), text)
                time.sleep(args.watch)
        else:
            show.live(lambda: text(ask(client)), args.watch)


def _status(args: argparse.Namespace) -> None:
    _watched(args, Client.status, show.status)


def _stats(args: argparse.Namespace) -> None:
    _watched(args, Client.stats, show.stats)


def _models(args: argparse.Namespace) -> None:
    with _client(args) as client:
        _print(args, client.models(), show.models)


def _load(args: argparse.Namespace) -> None:
    with _client(args) as client:
        started = time.perf_counter()
        with show.loading(quiet="json" in args) as progress:
            model = client.load(args.path, patches=_loras(args), dtype=args.dtype, progress=progress)
        told = next(told for told in client.models() if told["id"] == model.id)
        elapsed_s = time.perf_counter() - started
        _print(args, told, lambda told: f"{told['id']}  {told['name']}: {told['family']}, ready in {elapsed_s:.1f} s")


def _loras(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"path": path, "strength": strength} for path, strength in args.lora]


def _unload(args: argparse.Namespace) -> None:
    with _client(args) as client:
        model = _model_id(client, args.model)
        client.unload(model)
        _print(args, {"model": model}, lambda told: f"{told['model']} unloaded")


def _model_id(client: Client, start: str) -> str:
    ids = [told["id"] for told in client.models() if told["id"].startswith(start)]
    if len(ids) != 1:
        what = "is not unique" if ids else "is no loaded model"
        raise ModelNotFound(f"{start!r} {what}; `tacoctl models` lists them", model=start)
    return str(ids[0])


def _ps(args: argparse.Namespace) -> None:
    with _client(args) as client:
        _print(args, client.jobs(), show.jobs)


def _cancel(args: argparse.Namespace) -> None:
    with _client(args) as client:
        state = client.cancel(args.job)
        _print(args, {"job": args.job, "state": state}, lambda told: f"{told['job']} {told['state']}")


def _ping(args: argparse.Namespace) -> None:
    with _client(args) as client:
        seconds = client.ping()
        told = {"endpoint": client.endpoint, "round_trip_s": seconds}
        _print(args, told, lambda told: f"{told['endpoint']}: {seconds * 1000:.2f} ms")


def _install_service(args: argparse.Namespace) -> None:
    done: list[str] = []
    say = done.append if "json" in args else print
    service = install.Service(Path(args.prefix), args.dry_run, say)
    if args.uninstall:
        install.uninstall(service)
    else:
        install.install(service, args.gpus)
    if "json" in args:
        print(json.dumps({"done": done}, indent=2))


def _reload(args: argparse.Namespace) -> None:
    with _client(args) as client:
        changed = client.reload()
    _print(args, {"changed": changed}, lambda told: "changed: " + (", ".join(told["changed"]) or "nothing"))


def _drain(args: argparse.Namespace) -> None:
    with _client(args) as client:
        jobs = client.drain()
        drained = client.boot_id
        _print(args, {"jobs": jobs}, lambda told: f"draining: {told['jobs']} jobs to end")
    while args.wait and _boot_id(args) == drained:
        time.sleep(0.2)


def _boot_id(args: argparse.Namespace) -> str | None:
    """Of the daemon that answers now, if one does: nobody waits here for the next one."""
    try:
        with Client(getattr(args, "endpoint", None), timeout_s=1.0, reconnect_s=0.0) as client:
            client.status()
            return client.boot_id
    except ConnectionFailed:
        return None


def _version(args: argparse.Namespace) -> None:
    told: dict[str, Any] = {"tacoctl": __version__, "tacod": None}
    try:
        with Client(getattr(args, "endpoint", None), timeout_s=1.0, reconnect_s=0.0) as client:
            told["tacod"] = client.status()["version"]
    except ConnectionFailed:
        pass
    _print(args, told, lambda told: f"tacoctl {told['tacoctl']}\ntacod {told['tacod'] or 'not reachable'}")


def _sample(args: argparse.Namespace) -> None:
    _needs("torch", "safetensors")
    from safetensors.torch import load_file, save_file

    try:
        given = load_file(args.inputs)
    except OSError as error:
        raise RequestError(f"{args.inputs}: {error.strerror or error}; name a .safetensors file") from None
    known = {"noise", "latent", "sigmas"}
    odd = [key for key in given if key not in known and not key.startswith(("positive.", "negative."))]
    if odd:
        raise RequestError(f"{args.inputs}: {odd[0]!r} is none of noise, latent, sigmas, positive.*, negative.*")
    with _client(args) as client:
        model = _loaded(client, args.model)
        job = model.sample(**_run_inputs(args, given), cfg=args.cfg, sampler=args.sampler, seed=args.seed)
        show.progress(job, quiet="json" in args)
        latent = job.result().contiguous()
    save_file({"latent": latent}, args.output)
    told = {"job": job.id, "output": args.output, "steps": job.total, "seconds": model.stats.seconds}
    _print(args, told, lambda told: f"{told['output']}: {told['steps']} steps in {told['seconds']:.2f} s")


def _loaded(client: Client, name: str) -> Model:
    """A model by its id if such a one is loaded, else by its file."""
    for told in client.models():
        if told["id"] == name:
            return client.load(told["path"], dtype=told["dtype"])
    return client.load(name)


def _run_inputs(args: argparse.Namespace, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    import torch

    positive = _under("positive.", given)
    if not positive:
        raise RequestError(f"{args.inputs}: no positive.*; a run needs at least positive.context")
    batch = next(iter(positive.values())).shape[0]
    width, height = args.size
    noise = given.get("noise")
    if noise is None:
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.randn(batch, args.channels, height // 8, width // 8, generator=generator)
    sigmas = given.get("sigmas")
    if sigmas is None:
        even = torch.linspace(1, 0, args.steps + 1)
        sigmas = args.shift * even / (1 + (args.shift - 1) * even)
    return {
        "noise": noise,
        "latent": given.get("latent", torch.zeros_like(noise)),
        "sigmas": sigmas,
        "positive": positive,
        "negative": _under("negative.", given) or None,
    }


def _under(prefix: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


def _plan(args: argparse.Namespace) -> int:
    width, height = args.size
    options = ["--ranks", args.ranks, "--size", f"{width}x{height}", "--batch", args.batch, "--text", args.text]
    return _daemon_program("tacod.planner", [args.file, *options, *(["--json"] if "json" in args else [])])


def _demo(args: argparse.Namespace) -> int:
    options = [value for key in ("ranks", "output") if (given := getattr(args, key)) for value in (f"--{key}", given)]
    return _daemon_program("tacod.demo", [*([args.prompt] if args.prompt else []), *options])


def _bench(args: argparse.Namespace) -> int:
    _needs("tacod", "pydantic", "torch")
    return bench.run(args)


def _daemon_program(module: str, arguments: list[Any]) -> int:
    """Run a program that comes with the daemon; the client itself depends on nothing of it."""
    _needs("tacod", "pydantic", "torch")
    return subprocess.call([sys.executable, "-m", module, *map(str, arguments)])


def _needs(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise RequestError(f"this verb needs {', '.join(missing)}; run `pip install 'taco-dit[daemon]'`")


def _completion(args: argparse.Namespace) -> None:
    import shtab

    from tacod_client.cli.main import parser

    print(shtab.complete(parser(), shell=args.shell))


_VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "status": _status,
    "stats": _stats,
    "models": _models,
    "load": _load,
    "unload": _unload,
    "sample": _sample,
    "ps": _ps,
    "cancel": _cancel,
    "ping": _ping,
    "plan": _plan,
    "bench": _bench,
    "demo": _demo,
    "top": top.run,
    "doctor": doctor.run,
    "reload": _reload,
    "drain": _drain,
    "keygen": keygen.run,
    "install-service": _install_service,
    "version": _version,
    "completion": _completion,
}
