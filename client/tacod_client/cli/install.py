"""``tacoctl install-service``: put the systemd unit and what belongs to it in place, or take it away again."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tacod_client.errors import NotAllowed, TacodError

__all__ = ["Service", "install", "uninstall"]

UNIT = "etc/systemd/system/tacod.service"
CONFIG = "etc/tacod/config.toml"
RECORD = "etc/tacod/.installed"
"""What was put where, by digest: only that is taken away again."""
COMMAND = "/usr/bin/tacod"
"""What the shipped files call the daemon; the installed ones name the real one."""

Say = Callable[[str], None]


class Service:
    """The files under a prefix; ``/`` is the running system.

    Args:
        prefix: What the paths are under, such as an image that is being built.
        dry_run: Say what would be done, and do nothing.
        say: Hears a line for each thing that is done.
    """

    def __init__(self, prefix: Path, dry_run: bool, say: Say) -> None:
        self.prefix, self.dry_run, self.say = prefix, dry_run, say
        self.live = prefix.resolve() == Path("/")
        if self.live and os.geteuid() != 0 and not dry_run:
            raise NotAllowed("install-service writes to /etc: run it with sudo, or with --prefix or --dry-run")
        self.record: dict[str, str] = {}
        if self._at(RECORD).is_file():
            self.record = json.loads(self._at(RECORD).read_text())

    def _at(self, path: str) -> Path:
        return self.prefix / path

    def put(self, path: str, text: str, mine_to_edit: bool = False) -> None:
        """Write a file. One that a person edits is kept as it is, and the new one put beside it."""
        at = self._at(path)
        known = self.record.get(path)
        if at.exists() and mine_to_edit and _digest(at.read_text()) not in (known, _digest(text)):
            self.say(f"kept     {at} (edited)")
            path += ".new"
            at = self._at(path)
        self.say(f"{'would write' if self.dry_run else 'wrote   '} {at}")
        if self.dry_run:
            return
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text)
        at.chmod(0o644)
        self.record[path] = _digest(text)

    def take_away(self, path: str) -> None:
        """Remove a file that `put` wrote, unless it was edited since."""
        at = self._at(path)
        if not at.exists():
            return
        if _digest(at.read_text()) != self.record[path]:
            self.say(f"kept     {at} (edited)")
            return
        self.say(f"{'would remove' if self.dry_run else 'removed '} {at}")
        if not self.dry_run:
            at.unlink()

    def run(self, *command: str) -> None:
        """Run a command of the system's, on a live system."""
        if not self.live:
            return
        self.say(f"{'would run' if self.dry_run else 'run     '} {' '.join(command)}")
        if self.dry_run:
            return
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise TacodError(f"{command[0]} is not here; install-service is for systems with systemd") from None
        if done.returncode:
            raise TacodError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")

    def keep_record(self) -> None:
        """Note what was installed, for `uninstall`."""
        if not self.dry_run:
            self._at(RECORD).write_text(json.dumps(self.record, indent=1) + "\n")


def install(service: Service, gpus: Sequence[str] | None = None, tacod: str | None = None) -> None:
    """Put everything in place, and tell systemd of it.

    Args:
        service: Where.
        gpus: The GPUs for a configuration that isn't there yet, by index or UUID.
        tacod: The daemon's command; by default that of this environment.

    Raises `TacodError` if the daemon isn't installed in this environment, or if its user could not read it.
    """
    command = tacod or _command()
    check_readable(Path(command))
    for path, source in _files():
        text = source.read_text().replace(COMMAND, command)
        if path == CONFIG:
            service.put(path, _with_gpus(text, gpus), mine_to_edit=True)
        else:
            service.put(path, text)
    service.keep_record()
    service.run("systemd-sysusers")
    service.run("systemd-tmpfiles", "--create")
    service.run("systemctl", "daemon-reload")
    service.say("next: set models.roots in /etc/tacod/config.toml, add yourself to the group with")
    service.say("      `sudo usermod -aG tacod $USER`, and run `sudo systemctl enable --now tacod`")


def uninstall(service: Service) -> None:
    """Take away what `install` put there; a configuration that was edited stays."""
    if not service.record:
        raise TacodError(
            f"nothing of tacod's is recorded in {service.prefix / RECORD}; was it installed with this prefix?"
        )
    service.run("systemctl", "disable", "--now", "tacod")
    for path in sorted(service.record):
        service.take_away(path)
    if not service.dry_run:
        (service.prefix / RECORD).unlink(missing_ok=True)
        for folder in ("etc/tacod/examples", "etc/tacod"):
            at = service.prefix / folder
            if at.is_dir() and not any(at.iterdir()):
                at.rmdir()
    service.run("systemctl", "daemon-reload")
    service.say("kept     the user tacod and /var/lib/tacod, which holds what was uploaded")


def _files() -> Iterator[tuple[str, Path]]:
    """Where each file goes, and where it comes from."""
    # In a wheel they lie in the package; in a checkout at its root.
    here = Path(__file__)
    folder = next(
        (
            each
            for each in (here.parents[1] / "systemd", here.parents[3] / "systemd")
            if (each / "tacod.service").is_file()
        ),
        None,
    )
    if folder is None:
        raise TacodError("the service's files are not in this installation; install taco-dit again")
    yield UNIT, folder / "tacod.service"
    yield "etc/sysusers.d/tacod.conf", folder / "sysusers.conf"
    yield "etc/tmpfiles.d/tacod.conf", folder / "tmpfiles.conf"
    yield CONFIG, folder / "config.toml"
    for example in sorted((folder / "examples").glob("*.conf")):
        yield f"etc/tacod/examples/{example.name}", example


def _command() -> str:
    command = Path(sys.executable).parent / "tacod"
    if not os.access(command, os.X_OK):
        raise TacodError(
            f"there is no {command}: install the daemon into this environment, `pip install 'taco-dit[daemon]'`"
        )
    return str(command)


def check_readable(command: Path) -> None:
    """Raise `TacodError` if a user without rights of his own can't run a command or the interpreter that it names."""
    for path in dict.fromkeys((command, command.resolve(), command.with_name(Path(sys.executable).name).resolve())):
        for part in (*reversed(path.parents), path):
            if not part.exists():
                raise TacodError(f"{part} does not exist")
            needed = stat.S_IXOTH if part.is_dir() else stat.S_IROTH | stat.S_IXOTH
            if part.stat().st_mode & needed != needed:
                raise TacodError(
                    f"{part} is not open to the user tacod (mode {part.stat().st_mode & 0o777:o}); install TACO-DiT "
                    "where everyone may read it, for example into a virtual environment in /opt/tacod"
                )


def _with_gpus(text: str, gpus: Sequence[str] | None) -> str:
    if gpus is None:
        return text
    listed = ", ".join(gpu if gpu.isdigit() else json.dumps(gpu) for gpu in gpus)
    lines = text.splitlines(keepends=True)
    return "".join(f"gpus = [{listed}]\n" if line.startswith("# gpus = ") else line for line in lines)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
