"""``tacoctl install-service``: install the systemd unit and what belongs to it, or remove it again."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tacod_client.cli.files import file_errors, shipped
from tacod_client.errors import NotAllowed, RequestError, TacodError

__all__ = ["Service", "install", "uninstall"]

UNIT = "etc/systemd/system/tacod.service"
CONFIG = "etc/tacod/config.toml"
RECORD = "etc/tacod/.installed"
"""What was installed where, by digest, and the folders made for it: only that is removed again."""
COMMAND = "/usr/bin/tacod"
"""The daemon's command in the shipped files; installed files have the real path."""
NEEDED = ("tacod", "tacod_client", "pydantic", "torch", "xfuser")
"""Modules whose presence shows that this environment holds the daemon with all that it needs."""
BOOTED = Path("/run/systemd/system")
"""There if systemd runs this machine, as sd_booted(3) says."""

Say = Callable[[str], None]


class Service:
    """The files under a prefix; ``/`` is the running system.

    Args:
        prefix: What the paths are under, such as an image that is being built.
        dry_run: Say what would be done, and do nothing.
        say: Hears a line for each thing that is done.

    Raises `NotAllowed` for the running system without being root, and `TacodError` where systemd doesn't run.
    """

    def __init__(self, prefix: Path, dry_run: bool, say: Say) -> None:
        self.prefix, self.dry_run, self.say = prefix, dry_run, say
        self.live = prefix.resolve() == Path("/")
        if self.live and not dry_run:
            if os.geteuid() != 0:
                raise NotAllowed(
                    f"install-service writes to /etc: run `sudo {_beside('tacoctl')} install-service`, "
                    "or give --prefix or --dry-run"
                )
            if not BOOTED.is_dir():
                raise TacodError("systemd doesn't run here; give --prefix to put the files under another folder")
        self.files: dict[str, str] = {}
        self.folders: list[str] = []
        with file_errors():
            if self._at(RECORD).is_file():
                self._read_record()

    def _at(self, path: str) -> Path:
        return self.prefix / path

    def _read_record(self) -> None:
        try:
            record = json.loads(self._at(RECORD).read_text())
            self.files, self.folders = dict(record["files"]), list(record["folders"])
        except (ValueError, KeyError, TypeError):
            raise TacodError(f"{self._at(RECORD)} can't be read as a record; remove it and install again") from None

    def keep_record(self) -> None:
        """Note what was installed, for `uninstall`."""
        if self.files and not self.dry_run:
            self._make_folders(RECORD)
            self._at(RECORD).write_text(json.dumps({"files": self.files, "folders": self.folders}, indent=1) + "\n")

    def _make_folders(self, path: str) -> None:
        self.prefix.mkdir(parents=True, exist_ok=True)
        for folder in map(str, reversed(Path(path).parents)):
            if not self._at(folder).exists():
                self._at(folder).mkdir()
                self.folders.append(folder)

    def read(self, path: str) -> str:
        """A file's text; nothing if it isn't there."""
        return self._at(path).read_text(errors="replace") if self._at(path).exists() else ""

    def put(self, path: str, text: str) -> None:
        """Write a file. One that somebody else wrote or edited is kept as it is, and the new one put beside it."""
        at, digest = self._at(path), _digest(text.encode())
        if at.exists() and _digest(at.read_bytes()) not in (self.files.get(path), digest):
            self.say(f"kept     {at} (edited); the new one goes beside it")
            path += ".new"
            at = self._at(path)
        if not self.dry_run:
            self._make_folders(path)
            at.write_text(text)
            at.chmod(0o644)
            self.files[path] = digest
        self.say(f"{'would write' if self.dry_run else 'wrote   '} {at}")

    def take_away(self) -> None:
        """Remove what `put` wrote, unless it was edited since, and the folders that it made, if they are empty."""
        for path, digest in sorted(self.files.items()):
            at = self._at(path)
            if not at.exists():
                continue
            if _digest(at.read_bytes()) != digest:
                self.say(f"kept     {at} (edited)")
                continue
            if not self.dry_run:
                at.unlink()
            self.say(f"{'would remove' if self.dry_run else 'removed '} {at}")
        if self.dry_run:
            return
        self._at(RECORD).unlink(missing_ok=True)
        for folder in reversed(self.folders):
            # What others have put there stays, and so does the folder.
            with contextlib.suppress(OSError):
                self._at(folder).rmdir()

    def run(self, *command: str) -> None:
        """Run a command of the system's, on a live system."""
        if not self.live:
            return
        self.say(f"{'would run' if self.dry_run else 'run     '} {shlex.join(command)}")
        if self.dry_run:
            return
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TacodError(f"`{shlex.join(command)}` failed: {done.stderr.strip() or done.returncode}")


def install(service: Service, gpus: Sequence[str] | None = None, comfyui: str | None = None) -> None:
    """Put everything in place, and tell systemd of it.

    Args:
        service: Where.
        gpus: The GPUs for the configuration, by index or UUID; by default those that it names already.
        comfyui: The folder of the ComfyUI whose networks the daemon may run; by default the one that it names already.

    Raises `TacodError` if the daemon isn't whole in this environment or its user could not read it, `RequestError` for
    what names no GPU or no ComfyUI.
    """
    with file_errors():
        command = _daemon()
        texts = {path: source.read_text().replace(COMMAND, _quoted(command)) for path, source in _sources()}
        there = service.read(CONFIG)
        texts[CONFIG] = _with_comfyui(_with_gpus(texts[CONFIG], gpus, there), comfyui, there)
        again = (service.prefix / UNIT).exists()
        try:
            for path, text in texts.items():
                service.put(path, text)
        finally:
            service.keep_record()
        service.run("systemd-sysusers", "tacod.conf")
        service.run("systemd-tmpfiles", "--create", "tacod.conf")
        service.run("systemctl", "daemon-reload")
        # As the daemon's own user: now it shows whether he can read all that he has to.
        service.run("runuser", "-u", "tacod", "--", str(command), "--config", f"/{CONFIG}", "--check-config")
    if service.live and again:
        service.say("next: `sudo systemctl restart tacod`")
    elif service.live:
        service.say(f"next: set models.roots in /{CONFIG}, add yourself to the group with")
        service.say("      `sudo usermod -aG tacod $USER`, and run `sudo systemctl enable --now tacod`")


def uninstall(service: Service) -> None:
    """Take away what `install` put there; what was edited stays.

    Raises `TacodError` if nothing is recorded as installed.
    """
    if not service.files:
        raise TacodError(
            f"nothing of tacod's is recorded in {service.prefix / RECORD}; was it installed with this prefix?"
        )
    with file_errors():
        if (service.prefix / UNIT).exists():
            service.run("systemctl", "disable", "--now", "tacod")
        service.take_away()
        service.run("systemctl", "daemon-reload")
    if service.live:
        service.say("kept     the user tacod and /var/lib/tacod, which holds what was uploaded")


def _sources() -> Iterator[tuple[str, Path]]:
    """Where each file goes, and where it comes from."""
    folder = shipped("systemd", "tacod.service")
    yield UNIT, folder / "tacod.service"
    yield "etc/sysusers.d/tacod.conf", folder / "sysusers.conf"
    yield "etc/tmpfiles.d/tacod.conf", folder / "tmpfiles.conf"
    yield CONFIG, folder / "config.toml"
    for example in sorted((folder / "examples").glob("*.conf")):
        yield f"etc/tacod/examples/{example.name}", example


def _beside(name: str) -> Path:
    """A command of this environment."""
    return Path(sys.executable).parent / name


def _daemon() -> Path:
    """The daemon's command, if it would run as the service's user."""
    command = _beside("tacod")
    found = {module: importlib.util.find_spec(module) for module in NEEDED}
    missing = [module for module, spec in found.items() if spec is None]
    if missing or not os.access(command, os.X_OK):
        raise TacodError(
            f"the daemon is not in {sys.prefix} (missing: {', '.join(missing) or command}): install it there with "
            "`pip install 'taco-dit[daemon]'`, or run the tacoctl of the environment that has it"
        )
    check_readable(command)
    check_readable(Path(sys.executable))
    for spec in found.values():
        if spec is not None and spec.origin is not None:
            check_readable(Path(spec.origin))
    return command


def check_readable(path: Path) -> None:
    """Raise `TacodError` if a user without rights of his own can't read a file, by its name or where links lead."""
    for way in dict.fromkeys((path, path.resolve())):
        for part in (*reversed(way.parents), way):
            mode = part.stat().st_mode
            needed = stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH
            if mode & needed != needed:
                raise TacodError(
                    f"{part} is not open to the user tacod (mode {mode & 0o777:o}), who has to read {path}; install "
                    "TACO-DiT where everyone may read it, for example into a virtual environment in /opt/tacod"
                )


def _quoted(command: Path) -> str:
    """A command as a unit names it, see systemd.service(5)."""
    text = str(command)
    if re.search(r"[\"'\\\x00-\x1f\x7f]", text):
        raise TacodError(f"{text!r}: systemd runs no command whose path has quotes, backslashes or control characters")
    return f'"{text}"'.replace("%", "%%") if re.search(r"[^\w+,./:=@-]", text) else text


def _with_gpus(text: str, gpus: Sequence[str] | None, there: str) -> str:
    """The configuration with these GPUs, or with those of the one that is there."""
    if gpus is None:
        line = next((line for line in there.splitlines() if re.match(r"gpus = \[.*\]", line)), None)
    else:
        if odd := [gpu for gpu in gpus if not re.fullmatch(r"\d+|GPU-[0-9a-fA-F-]+", gpu, re.ASCII)]:
            raise RequestError(f"{odd[0]!r} names no GPU; give indexes or UUIDs as `nvidia-smi -L` shows them")
        line = f"gpus = [{', '.join(str(int(gpu)) if gpu.isdigit() else json.dumps(gpu) for gpu in gpus)}]"
    return _with_line(text, "# gpus = ", line)


def _with_comfyui(text: str, path: str | None, there: str) -> str:
    """The configuration with this ComfyUI, or with that of the one that is there."""
    if path is None:
        _, _, section = there.partition("[comfyui]\n")
        line = next(iter(re.findall(r'(?m)^path = ".*"', section.partition("\n[")[0])), None)
    else:
        folder = Path(path)
        if not folder.is_absolute() or not (folder / "comfy" / "model_detection.py").is_file():
            raise RequestError(f"{path!r} is no ComfyUI; give the absolute path of its folder, which has main.py in it")
        check_readable(folder / "comfy" / "model_detection.py")
        line = f"path = {json.dumps(path, ensure_ascii=False)}"
    return _with_line(text, "# path = ", line)


def _with_line(text: str, place: str, line: str | None) -> str:
    """A configuration with a line in place of the comment that begins so; unchanged if there is no line."""
    if line is None:
        return text
    return "".join(f"{line}\n" if each.startswith(place) else each for each in text.splitlines(keepends=True))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
