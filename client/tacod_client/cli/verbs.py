"""What each verb of ``tacoctl`` does."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tacod_client.cli import doctor, install, keygen, loaded, nodes, sample, show, top
from tacod_client.cli.output import document
from tacod_client.cli.parser import parser
from tacod_client.client import Client
from tacod_client.errors import ConnectionFailed, RequestError, TacodError
from tacod_client.version import __version__

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Run the verb that ``args`` names; returns the exit code."""
    code = _VERBS[args.verb](args)
    return code or 0


def _print(args: argparse.Namespace, value: Any, text: Callable[[Any], Any]) -> None:
    if "json" in args:
        document(value, indent=None if args.watch else 2)
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
            model = client.load(
                args.path, patches=_loras(args), dtype=args.dtype, progress=progress, weights=args.weights
            )
        reply = loaded.the_one(client, model.id)
        elapsed_s = time.perf_counter() - started
        _print(args, reply, lambda reply: show.loaded(reply, elapsed_s))


def _loras(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"path": path, "strength": strength} for path, strength in args.lora]


def _unload(args: argparse.Namespace) -> None:
    with _client(args) as client:
        model = str(loaded.the_one(client, args.model)["id"])
        client.unload(model)
        _print(args, {"model": model}, lambda reply: f"{reply['model']} unloaded")


def _ps(args: argparse.Namespace) -> None:
    with _client(args) as client:
        _print(args, client.jobs(), show.jobs)


def _cancel(args: argparse.Namespace) -> None:
    with _client(args) as client:
        state = client.cancel(args.job)
        _print(args, {"job": args.job, "state": state}, lambda reply: f"{reply['job']} {reply['state']}")


def _ping(args: argparse.Namespace) -> None:
    with _client(args) as client:
        seconds = client.ping()
        reply = {"endpoint": client.endpoint, "round_trip_s": seconds}
        _print(args, reply, lambda reply: f"{reply['endpoint']}: {seconds * 1000:.2f} ms")


def _install_service(args: argparse.Namespace) -> None:
    done: list[str] = []
    say = done.append if "json" in args else show.out
    service = install.Service(Path(args.prefix), args.dry_run, say)
    if args.uninstall:
        install.uninstall(service)
    else:
        install.install(service, args.gpus, args.comfyui)
    if "json" in args:
        document({"done": done})


def _install_nodes(args: argparse.Namespace) -> int:
    done: list[str] = []
    missing: list[str] = []
    say = done.append if "json" in args else show.out
    comfyui = nodes.ComfyUI.find(args.path)
    if args.uninstall:
        nodes.uninstall(comfyui, args.dry_run, say)
    else:
        missing = nodes.install(comfyui, args.dry_run, say)
    if "json" in args:
        document({"done": done, "missing": missing})
        return int(bool(missing))
    for each in missing:
        show.out(f"missing  {each}")
    if not (args.uninstall or missing):
        show.out("next: start ComfyUI again; Browse Templates has workflows with the nodes")
    return int(bool(missing))


def _reload(args: argparse.Namespace) -> None:
    with _client(args) as client:
        changed = client.reload()
    _print(args, {"changed": changed}, lambda reply: "changed: " + (", ".join(reply["changed"]) or "nothing"))


def _drain(args: argparse.Namespace) -> None:
    with _client(args) as client:
        jobs = client.drain()
        drained = client.boot_id
        _print(args, {"jobs": jobs}, lambda reply: f"draining: {reply['jobs']} jobs to end")
    while args.wait and _boot_id(args) == drained:
        time.sleep(0.2)


def _boot_id(args: argparse.Namespace) -> str | None:
    """The boot id of a daemon that answers now, if one does."""
    try:
        with Client(getattr(args, "endpoint", None), timeout_s=1.0, reconnect_s=0.0) as client:
            client.status()
            return client.boot_id
    except ConnectionFailed:
        return None


def _version(args: argparse.Namespace) -> None:
    reply: dict[str, Any] = {"tacoctl": __version__, "tacod": None}
    try:
        with Client(getattr(args, "endpoint", None), timeout_s=1.0, reconnect_s=0.0) as client:
            reply["tacod"] = client.status()["version"]
    except ConnectionFailed:
        pass
    _print(args, reply, lambda reply: f"tacoctl {reply['tacoctl']}\ntacod {reply['tacod'] or 'not reachable'}")


def _sample(args: argparse.Namespace) -> None:
    _needs("torch", "safetensors")
    sample.run(args)


def _plan(args: argparse.Namespace) -> int:
    width, height = args.size
    options = ["--ranks", args.ranks, "--size", f"{width}x{height}", "--batch", args.batch, "--text", args.text]
    given = {"--memory": args.memory, "--shares": args.shares, "--comfyui": args.comfyui}
    options += [part for option, value in given.items() if value is not None for part in (option, value)]
    return _daemon_program("tacod.tools.plan", args, [*options, "--", args.file])


def _demo(args: argparse.Namespace) -> int:
    options = [value for key in ("ranks", "output") if (given := getattr(args, key)) for value in (f"--{key}", given)]
    return _daemon_program(
        "tacod.tools.demo", args, [*options, *(["--", args.prompt] if args.prompt is not None else [])]
    )


def _bench(args: argparse.Namespace) -> int:
    _needs("tacod", "pydantic", "torch")
    # It alone computes: the others are quicker without numpy.
    from tacod_client.cli import bench

    return bench.run(args)


def _daemon_program(module: str, args: argparse.Namespace, arguments: list[Any]) -> int:
    """Run a program that comes with the daemon; the client itself depends on nothing of it."""
    _needs("tacod", "pydantic", "torch")
    options = ["--json"] if "json" in args else []
    code = subprocess.call([sys.executable, "-m", module, *options, *map(str, arguments)])
    if code < 0:
        raise TacodError(f"`python -m {module}` ended by signal {-code}; see `dmesg` for why")
    return code


def _needs(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise RequestError(f"this verb needs {', '.join(missing)}; run `pip install 'taco-dit[daemon]'`")


def _completion(args: argparse.Namespace) -> None:
    import shtab

    script = shtab.complete(parser(), shell=args.shell)
    _print(args, {"shell": args.shell, "script": script}, lambda reply: reply["script"])


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
    "install-nodes": _install_nodes,
    "install-service": _install_service,
    "version": _version,
    "completion": _completion,
}
