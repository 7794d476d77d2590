"""scripts/start_comfyui_gpu345.sh, with stand-ins for ComfyUI, tacod, nvidia-smi and systemd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "start_comfyui_gpu345.sh"
REPORT = """
import os, sys
print("ARGS", *sys.argv[1:])
for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TACOD_ENDPOINT"):
    print(name, os.environ.get(name))
sys.exit(7)
"""
STAYS = """
import os, sys, time
try:
    print("up", os.getpid(), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(5)
"""
TACOD = """#!/bin/sh
echo "tacod $*" >> "$TRACE"
case "$*" in *--check-config*) cat "$2" >> "$TRACE"; exit 0 ;; esac
trap 'echo stopped >> "$TRACE"; exit 0' TERM
while :; do sleep 0.02; done
"""


class Machine:
    """A folder with commands of its own before all others."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.comfyui, self.trace = folder / "bin", folder / "ComfyUI", folder / "trace"
        self.bin.mkdir()
        (self.comfyui / "custom_nodes").mkdir(parents=True)
        (self.comfyui / "main.py").write_text(REPORT)
        self.command("systemctl", "#!/bin/sh\nexit 1\n")
        self.command("nvidia-smi", "#!/bin/sh\nfor i in 0 1 2 3 4 5; do echo $i, GPU-$i; done\n")
        self.command("tacod", TACOD)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TRACE": str(self.trace),
            "COMFYUI_PATH": str(self.comfyui),
            "COMFYUI_PYTHON": sys.executable,
        }

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def daemon_says(self, devices: str) -> None:
        """A Python for ComfyUI whose client knows such a daemon."""
        self.command(
            "python-of-comfyui",
            f"""#!/bin/sh
case "$*" in *status*) echo "{devices}" ;; *) exec {sys.executable} "$@" ;; esac
""",
        )
        self.environment["COMFYUI_PYTHON"] = str(self.bin / "python-of-comfyui")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        everything = {key: value for key, value in {**self.environment, **environment}.items() if value}
        return subprocess.run(
            [SCRIPT, *arguments], env=everything, capture_output=True, text=True, timeout=30, check=False
        )


def _hear_interrupts() -> None:
    """A shell that runs the tests in the background has them ignore Ctrl-C, and what they start, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_daemon_on_345_and_comfyui_on_the_others(machine: Machine) -> None:
    done = machine.run("--preview-method", "auto")
    assert done.returncode == 7, done.stderr
    assert "ARGS --listen 0.0.0.0 --port 12215 --preview-method auto" in done.stdout
    assert "CUDA_VISIBLE_DEVICES 0,1,2" in done.stdout
    assert "CUDA_DEVICE_ORDER PCI_BUS_ID" in done.stdout
    assert f"TACOD_ENDPOINT ipc://{machine.comfyui.parent}/.cache/tacod/tacod.sock" in done.stdout
    trace = machine.trace.read_text()
    assert "gpus = [3,4,5]" in trace
    assert f'roots = ["{machine.comfyui}/models"]' in trace
    assert trace.endswith("stopped\n"), "the daemon ends with ComfyUI"
    assert (machine.comfyui / "custom_nodes" / "taco_dit" / "nodes.py").is_file()


def test_the_config_that_it_writes_is_one(machine: Machine) -> None:
    machine.command("tacod", f"#!/bin/sh\nexec {sys.executable} -m tacod.daemon --config $2 --print-config\n")
    done = machine.run()
    assert "gpus = [3, 4, 5]" in done.stdout


def test_its_networks_are_for_the_daemon_only_if_that_is_said(machine: Machine) -> None:
    machine.command("tacod", f"#!/bin/sh\nexec {sys.executable} -m tacod.daemon --config $2 --print-config\n")
    assert "# path is not set" in machine.run().stdout
    done = machine.run(TACO_NETWORKS="1")
    assert f'[comfyui]\npath = "{machine.comfyui}"' in done.stdout


def test_other_gpus_and_none_left(machine: Machine) -> None:
    done = machine.run(TACO_GPUS="0,1,2,3,4,5", PORT="8188")
    assert "ARGS --listen 0.0.0.0 --port 8188 --cpu" in done.stdout
    assert "gpus = [0,1,2,3,4,5]" in machine.trace.read_text()


def test_the_service_is_started_where_there_is_one(machine: Machine) -> None:
    machine.command("systemctl", '#!/bin/sh\necho "systemctl $*" >> "$TRACE"\n[ "$1" != is-active ]\n')
    machine.daemon_says("0,GPU-2")
    done = machine.run()
    assert done.returncode == 7
    assert machine.trace.read_text().splitlines()[-1] == "systemctl start tacod"
    assert "TACOD_ENDPOINT None" in done.stdout
    assert "CUDA_VISIBLE_DEVICES 1,3,4,5" in done.stdout, "its GPUs are not for ComfyUI, whatever TACO_GPUS says"


def test_a_daemon_that_runs_is_used(machine: Machine) -> None:
    machine.daemon_says("0,1,2,10")
    done = machine.run(TACOD_ENDPOINT="ipc:///run/own.sock")
    assert "TACOD_ENDPOINT ipc:///run/own.sock" in done.stdout
    assert "CUDA_VISIBLE_DEVICES 3,4,5" in done.stdout
    assert not machine.trace.exists()


def test_a_daemon_that_does_not_answer_is_told(machine: Machine) -> None:
    done = machine.run(TACOD_ENDPOINT=f"ipc://{machine.bin}/nobody.sock")
    assert done.returncode == 1
    assert "no tacod listens at" in done.stderr
    assert "ComfyUI can't be kept off the daemon's GPUs" in done.stderr
    assert "ARGS" not in done.stdout


def test_as_the_guide_has_it(machine: Machine) -> None:
    """From ComfyUI's folder, by a link there."""
    link = machine.comfyui / "start_comfyui_gpu345.sh"
    link.symlink_to(SCRIPT)
    environment = {key: value for key, value in machine.environment.items() if key != "COMFYUI_PATH"}
    done = subprocess.run(
        ["./start_comfyui_gpu345.sh"], cwd=machine.comfyui, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert (machine.comfyui / "custom_nodes" / "taco_dit" / "nodes.py").is_file()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 5), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_ends_both(machine: Machine, number: signal.Signals, code: int) -> None:
    (machine.comfyui / "main.py").write_text(STAYS)
    with subprocess.Popen(
        [SCRIPT], env=machine.environment, stdout=subprocess.PIPE, text=True, preexec_fn=_hear_interrupts
    ) as script:
        assert script.stdout is not None
        up = next(line for line in script.stdout if line.startswith("up"))
        script.send_signal(number)
        assert script.wait(timeout=30) == code
    with pytest.raises(ProcessLookupError):
        os.kill(int(up.split()[1]), 0)
    assert machine.trace.read_text().endswith("stopped\n")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"COMFYUI_PATH": ""}, "set COMFYUI_PATH to your ComfyUI folder"),
        ({"COMFYUI_PATH": "/nowhere"}, "there is no main.py in COMFYUI_PATH=/nowhere"),
        ({"COMFYUI_PYTHON": "/bin/false"}, "has no TACO-DiT client; run: /bin/false -m pip install"),
    ],
)
def test_what_is_missing_is_told(machine: Machine, environment: dict[str, str], said: str) -> None:
    done = machine.run(**environment)
    assert done.returncode == 1
    assert said in done.stderr
