"""Two daemons don't share an endpoint."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers import FLUX, Daemon


def test_the_second_is_refused_and_the_first_unharmed(sturdy: Daemon) -> None:
    with sturdy.client() as client:
        model = client.load(FLUX.file)
        before = sturdy.processes()
        second = subprocess.run(
            [sys.executable, "-m", "tacod.daemon", "--config", str(sturdy.config)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert second.returncode == os.EX_CONFIG
        assert f"pid {sturdy.pid}" in second.stderr
        assert str(sturdy.socket) in second.stderr
        assert "Traceback" not in second.stderr
        assert sturdy.processes() == before
        FLUX.check(model)
        with sturdy.client() as another:
            assert another.status()["boot_id"] == client.boot_id
