"""The command ``tacod``: reads the configuration, takes the endpoint, assembles the supervisor and runs its loop."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tacod
from tacod import __version__, logs
from tacod.config import Config, ConfigError, load_config, to_toml
from tacod.execution.groups import Groups, preloaded
from tacod.execution.manifest import Model
from tacod.group.processes import devices
from tacod.heap import keep_freed_memory
from tacod.lifecycle import Lifecycle
from tacod.observe.exporter import Exporter
from tacod.observe.monitor import Monitor
from tacod.serving import checks, places, report
from tacod.serving.access import Keys
from tacod.serving.guard import Guard
from tacod.serving.listener import Listener
from tacod.serving.results import send_end, send_progress
from tacod.serving.server import Server
from tacod.serving.sessions import Sessions
from tacod.serving.state import State
from tacod.serving.uploads import Uploads
from tacod.serving.verbs import Verbs
from tacod_client import streams
from tacod_client.text import encodable

__all__ = ["assemble", "main"]

log = logging.getLogger("tacod")

EX_CONFIG = 78
DEFAULT_CONFIG = "/etc/tacod/config.toml"
FILES = 64
FILES_OF_RANK = 4
"""How many files a start must be able to open, and how many more for each rank; what clients need is beside these."""
MOST_FILES = 1 << 20
"""As many as a kernel lets a process have by default. Some programs take time for each that they may have."""
FILES_OF_FLOOD = 1 << 14
"""More than clients that connect as fast as they can take before they are ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tacod``; returns the exit code: 0 after a drain, 1 if the ranks were given up, 78 if it can't start."""
    streams.hold()
    args = _parser().parse_args(argv)
    path = args.config
    try:
        config = load_config(path)
        level = args.log_level or config.log_level
        if args.print_config:
            # TOML is UTF-8 whatever the locale is.
            return _say(to_toml(config), encoding="utf-8")
        if args.check_config:
            if lines := [str(fault) for fault in checks.faults(path, config)]:
                raise ConfigError("\n".join(lines))
            return _say(f"{encodable(path)}: ok\n")
        # A SIGABRT, such as systemd's watchdog sends, prints the loop's stack. Not the other threads': they run on
        # meanwhile, and reading a stack that changes can crash before this one is printed.
        faulthandler.enable(sys.__stderr__ or 2, all_threads=False)
        os.environ["TACOD_LOG_LEVEL"] = level
        logs.configure(level)
        if (lack := _have_files(config)) is not None:
            logs.complain(lack)
            return EX_CONFIG
        keep_freed_memory()
        path = _from_anywhere(path)
        places.check(path, config)
        _leave_the_folder()
        with places.hold(config.socket_path) as folder:
            return _serve(config, path, folder)
    except ConfigError as error:
        # What fails only when it is used knows its key, and not the file.
        text = str(error)
        logs.complain(text if text.startswith(f"{path}:") else f"{path}:{text}")
        return EX_CONFIG


def _say(text: str, **options: str) -> int:
    """Write a text to stdout; returns the exit code."""
    try:
        with streams.stdout():
            if options and (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:
                reconfigure(**options)
            print(text, end="")
    except OSError as error:
        # Of a reader that went away, as `head` does, there is nothing to say.
        if not isinstance(error, BrokenPipeError):
            logs.complain(f"{error.filename}: {error.strerror}")
        streams.mute(sys.stdout)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse itself hides what can't be written.
        if file is not sys.stdout:
            streams.complain(message.removesuffix("\n"))
        elif _say(message):
            raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tacod", description="Runs diffusion transformers on all of your GPUs at once.")
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, metavar="FILE", help=f"the configuration (default {DEFAULT_CONFIG})"
    )
    parser.add_argument("--check-config", action="store_true", help="check the configuration and exit")
    parser.add_argument(
        "--print-config", action="store_true", help="print the configuration with its defaults and exit"
    )
    parser.add_argument("--version", action="version", version=f"tacod {__version__}")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], help="more or fewer log lines")
    return parser


def _have_files(config: Config) -> str | None:
    """Have as many open files as the system lets us; returns what to say if these are too few for a start.

    A connection takes one and a shared memory two, and 1024 is a usual default. ZeroMQ and others end in their own ways
    where there are none left.
    """
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MOST_FILES:
        more = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, most))
            soft = more
    if soft == resource.RLIM_INFINITY or soft >= FILES_OF_FLOOD:
        return None
    needed = FILES + FILES_OF_RANK * sum(
        group.ranks if group.gpus is None else len(group.gpus) for group in config.groups
    )
    cure = "`ulimit -Hn 65536` as root, or LimitNOFILE= of its unit"
    if soft < needed:
        return f"the limit of open files is {soft}, and tacod needs {needed}: {cure}"
    log.warning(
        "the limit of open files is %d, and a flood of connections can take so many and end tacod: %s", soft, cure
    )
    return None


def _from_anywhere(path: str) -> str:
    """An absolute path; a link at its end stays a link, so that it may be changed."""
    return path if os.path.isabs(path) else str(Path(path).parent.resolve() / Path(path).name)


def _leave_the_folder() -> None:
    """Change to ``/``, because the start's folder may be deleted, and torch can't be imported in a deleted one."""
    given = os.environ.get("PYTHONPATH")
    paths = given.split(os.pathsep) if given else []
    home = str(Path(tacod.__file__).parents[1])
    if sys.path[0] == home:
        # Started by ``python -m`` in a checkout; the ranks, which start elsewhere, are to find it too.
        paths.insert(0, home)
    if paths:
        with contextlib.suppress(FileNotFoundError):
            os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths))
    os.chdir("/")


def _serve(config: Config, config_path: str, folder: Path) -> int:
    keys = Keys.read(config_path, config.curve)
    names = devices(config.groups)
    preload = preloaded(config_path, config, list(map(len, names)))
    with contextlib.ExitStack() as ending:
        signals, wakeup = socket.socketpair()
        for end in (signals, wakeup):
            ending.callback(end.close)
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno())
        ending.callback(signal.set_wakeup_fd, -1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)
        exporter = None
        if config.metrics.listen is not None:
            exporter = Exporter(config.metrics.listen)
            ending.callback(exporter.close)
        state, server, lifecycle = assemble(config, config_path, names, preload, folder, keys, ending)
        log.info("tacod %s, pid %d, listening on %s", __version__, os.getpid(), config.endpoint)
        if config.curve is not None and keys is not None:
            log.info("and on %s, for %d clients by their CURVE keys", config.curve.listen, len(keys.clients))
        code = None
        while code is None:
            server.turn(signals.fileno())
            if exporter is not None and exporter.due(time.monotonic()):
                exporter.publish(report.reading(state))
            for caught in _caught(signals):
                lifecycle.on_signal(caught)
            code = lifecycle.turn()
        return code


def assemble(
    config: Config,
    config_path: str,
    devices: Sequence[list[str]],
    preload: Sequence[Iterable[Model]],
    folder: Path,
    keys: Keys | None,
    ending: contextlib.ExitStack,
) -> tuple[State, Server, Lifecycle]:
    """Make the supervisor's parts; ``ending`` closes them.

    ``devices`` are those of each group's ranks, ``preload`` the models that each is to have.
    """
    listener = Listener(config, keys)
    ending.callback(listener.close)
    limits = config.limits
    sessions = Sessions(listener.socket, limits.clients, limits.clients_per_user, limits.share_bytes)
    groups = Groups(
        config,
        devices,
        preload,
        folder,
        on_progress=lambda job, body: send_progress(sessions, job, body),
        on_end=lambda executor, job, step: send_end(sessions, executor, job, step),
    )
    ending.callback(groups.close)
    # Ranks on other hosts aren't measured here, where there may be no GPU.
    monitor = Monitor(
        "cpu" if config.launcher == "ray" else config.device,
        lambda: [each for executor in groups for each in executor.group.local_devices],
    )
    ending.callback(monitor.close)
    uploads = Uploads(config.models.uploads, config.models.upload_bytes, lambda: groups.files)
    guard = Guard(limits.held_bytes, listener.addresses, sessions.sockets)
    ending.callback(guard.close)
    boot_id, now = secrets.token_hex(8), time.monotonic()
    state = State(config, boot_id, now, listener, sessions, groups, monitor, uploads, guard)
    lifecycle = Lifecycle(state, config_path)
    return state, Server(state, Verbs(state, lifecycle).answer), lifecycle


def _caught(signals: socket.socket) -> bytes:
    try:
        return signals.recv(64)
    except BlockingIOError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
