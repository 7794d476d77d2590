"""A stand-in for systemd's end of the notification socket."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from helpers import eventually

PAT = "WATCHDOG=1"
MORE_TIME = "EXTEND_TIMEOUT_USEC=60000000"


class Manager:
    """Hears all that a daemon tells it, with the time of each, until the block ends."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tacod-")
        self.address = str(Path(self._folder.name, "notify"))
        self.told: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(0.1)
        self._done = threading.Event()
        self._listener = threading.Thread(target=self._listen)

    def __enter__(self) -> Manager:
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._listener.join()
        self._socket.close()
        self._folder.cleanup()

    def _listen(self) -> None:
        while not self._done.is_set():
            try:
                said = self._socket.recv(4096).decode()
            except TimeoutError:
                continue
            self.told.append((time.monotonic(), said))

    def environment(self, watchdog_s: float) -> dict[str, str]:
        """What systemd sets for a service with such a WatchdogSec."""
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(int(watchdog_s * 1e6))}

    @property
    def texts(self) -> list[str]:
        """What was said of the daemon's state, and not of its time."""
        return [text for _, text in self.told if text not in (PAT, MORE_TIME)]

    @property
    def pats(self) -> int:
        """How often the watchdog was told to rest."""
        return sum(text == PAT for _, text in self.told)

    @property
    def silent_s(self) -> float:
        """How long ago it was told so last."""
        return time.monotonic() - next(moment for moment, text in reversed(self.told) if text == PAT)

    def hears_more_pats(self, n: int, timeout_s: float) -> None:
        """Wait for n more of them."""
        wanted = self.pats + n
        eventually(lambda: self.pats >= wanted, timeout_s, f"the watchdog is told {n} times to rest")
