"""CURVE keys for connections over TCP: how they are made, stored and found.

The files are ZeroMQ's own certificates (https://rfc.zeromq.org/spec/26/ describes the mechanism): a public key in
``NAME.key``, and with its secret key in ``NAME.key_secret``.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from tacod_client.errors import ConnectionFailed, RequestError
from tacod_client.small_file import read_small

__all__ = ["ClientKeys", "find_keys", "make_keys", "own_folder", "read_public_key", "read_secret_key"]

PUBLIC = ".key"
SECRET = ".key_secret"
MOST_BYTES = 64 << 10
"""Of a file; ZeroMQ's own have some hundred."""
_KEY = re.compile(rb"^[ \t]*(public|secret)-key[ \t]*=[ \t\"']*([^\s\"']+)", re.MULTILINE)
_FORMAT = """\
# {title}
metadata
    name = "{name}"
curve
    public-key = "{public}"
"""


@dataclass(frozen=True)
class ClientKeys:
    """The keys for a connection over TCP: the client's own pair and the daemon's public key, each as Z85 text."""

    path: Path
    public: bytes
    secret: bytes
    server_path: Path
    server: bytes


def own_folder() -> Path:
    """The folder of a user's keys: ``$XDG_CONFIG_HOME/tacod``, by default ``~/.config/tacod``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "tacod")


def find_keys(key: str | os.PathLike[str] | None, server_key: str | os.PathLike[str] | None) -> ClientKeys:
    """The arguments, else ``TACOD_CURVE_KEY`` and ``TACOD_CURVE_SERVER_KEY``, else those in the user's own folder.

    Raises `ConnectionFailed` for keys that aren't there or can't be used.
    """
    path = Path(key or os.environ.get("TACOD_CURVE_KEY") or own_folder() / f"client{SECRET}")
    server = Path(server_key or os.environ.get("TACOD_CURVE_SERVER_KEY") or own_folder() / f"server{PUBLIC}")
    try:
        return ClientKeys(path, *read_secret_key(path), server, read_public_key(server))
    except OSError as error:
        missing, what = Path(error.filename), error.strerror
        how = (
            "copy the daemon's public key there, or name it in TACOD_CURVE_SERVER_KEY"
            if missing == server
            else "make one with `tacoctl keygen`, or name yours in TACOD_CURVE_KEY"
        )
        raise ConnectionFailed(f"TCP needs CURVE keys, and {missing}: {what}; {how}") from None
    except ValueError as error:
        raise ConnectionFailed(f"TCP needs CURVE keys, and {error}") from None


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a pair of keys; returns the secret file, for its owner alone, and the public one.

    Raises `RequestError` if a file is there already, or can't be written.
    """
    if not name or name.startswith(".") or any(not (char.isalnum() or char in "-_.@") for char in name):
        raise RequestError(f"{name!r:.80}: a key's name is of letters, digits, '-', '_', '.' and '@'")
    public, secret = (text.decode() for text in zmq.curve_keypair())
    paths = folder / f"{name}{SECRET}", folder / f"{name}{PUBLIC}"
    taken = next((path for path in paths if os.path.lexists(path)), None)
    if taken is not None:
        raise RequestError(f"{taken} is there already, and keys are never overwritten; move it, or use another name")
    public_file = _FORMAT.format(title="A CURVE public key, to be given to who asks for it.", name=name, public=public)
    kept = _FORMAT.format(title="A CURVE secret key: whoever reads this can pass for you.", name=name, public=public)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(paths[0], f'{kept}    secret-key = "{secret}"\n', 0o600)
        _write(paths[1], public_file, 0o644)
    except OSError as error:
        raise RequestError(f"{error.filename}: {error.strerror}") from None
    return paths


def _write(path: Path, text: str, mode: int) -> None:
    """Write a new file; the exclusive open is what keeps an old one safe."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)


def read_secret_key(path: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """A pair of keys, public and secret, as Z85 text.

    Raises `OSError` if the file can't be read, `ValueError` if it holds no such pair or is open to all.
    """
    public, secret = _read(path)
    if secret is None:
        raise ValueError(f"{path} holds no secret key; name the file that ends in {SECRET}")
    mode = os.stat(path).st_mode
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ValueError(f"{path} is open to others (mode {stat.S_IMODE(mode):04o}); run `chmod 600 {path}`")
    if not _is_key(secret) or zmq.curve_public(secret) != public:
        raise ValueError(f"{path}: its secret key doesn't belong to its public key; make a new pair")
    return public, secret


def read_public_key(path: str | os.PathLike[str]) -> bytes:
    """A public key, as Z85 text.

    Raises `OSError` if the file can't be read, `ValueError` if it holds none.
    """
    return _read(path)[0]


def _read(path: str | os.PathLike[str]) -> tuple[bytes, bytes | None]:
    # As `zmq.auth.load_certificate` does, which opens whatever is there and waits for it.
    found = dict(_KEY.findall(read_small(path, MOST_BYTES)))
    public, secret = found.get(b"public", b""), found.get(b"secret")
    if not _is_key(public):
        raise ValueError(f"{path} holds no CURVE public key; `tacoctl keygen` makes such files")
    return public, secret


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == 40 and len(z85.decode(text)) == 32
    except (KeyError, ValueError, OverflowError):
        return False
