"""How ``tacoctl`` begins and ends: with any streams, with one line for what went wrong, with what it made."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tacod_client import errors
from tacod_client.cli import ending, main
from tacod_client.cli.output import Output, document
from tacod_client.errors import RequestError, TacodError
from tacod_client.text import typed

TACOCTL = f"{sys.executable} -c 'import sys; from tacod_client.cli import main; sys.exit(main())'"
NOWHERE = "--endpoint ipc:///nowhere/tacod.sock"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What a shell makes of it."""
    script = f'tacoctl() {{ {TACOCTL} "$@"; }}; set -o pipefail; {command}'
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, **environment}, capture_output=True, check=False, timeout=120
    )


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (f"tacoctl {NOWHERE} version >&-", 0),
        (f"tacoctl {NOWHERE} --json version >&-", 0),
        (f"tacoctl {NOWHERE} status 2>&-", 3),
        (f"tacoctl {NOWHERE} status <&- >&- 2>&-", 3),
        (f"tacoctl {NOWHERE} status 2>/dev/full", 3),
        (f"tacoctl {NOWHERE} version >/dev/full", 1),
        (f"tacoctl {NOWHERE} --json version >/dev/full", 1),
        ("tacoctl plan /nowhere --ranks 2 >&- 2>&-", 4),
        ("tacoctl completion bash | true", 1),
        ("tacoctl --json completion zsh | true", 1),
        ("tacoctl frobnicate 2>/dev/full", 2),
        ("tacoctl --help >/dev/full", 1),
        ("tacoctl sample --help >/dev/full", 1),
        ("tacoctl --help >&-", 0),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int) -> None:
    done = shell(command)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize("verb", ["", "sample", "plan"])
def test_help_that_can_not_be_written_is_told(verb: str) -> None:
    assert shell(f"tacoctl {verb} --help >/dev/full").stderr == b"tacoctl: stdout: No space left on device\n"


@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors", "pipe.gguf", "link", "/dev/null"])
def test_a_plan_of_no_file_is_refused_before_it_blocks(name: str, tmp_path: Path) -> None:
    for pipe in ("pipe", "pipe.safetensors", "pipe.gguf"):
        os.mkfifo(tmp_path / pipe)
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    done = shell(f"tacoctl plan {tmp_path / name} --ranks 2")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"is no regular file" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"PYTHONIOENCODING": "gbk"},
        {"PYTHONIOENCODING": "utf-16"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
@pytest.mark.parametrize("name", [b"\xe6\xa8\xa1\xe5\x9e\x8b", b"caf\xe9"], ids=["utf-8", "no utf-8"])
def test_a_document_is_utf_8_in_any_locale(environment: dict[str, str], name: bytes, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/" + name
    script = f"{TACOCTL} keygen alice --json --folder".encode() + b" '" + folder + b"'"
    done = subprocess.run([b"sh", b"-c", script], env={**os.environ, **environment}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.decode("utf-8"))
    assert set(told) == {"secret", "public", "public_key"}
    assert os.path.exists(folder + b"/alice.key")
    if not environment.get("LC_ALL"):
        assert os.fsencode(told["public"]) == folder + b"/alice.key"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
@pytest.mark.parametrize("verb", ["", "sample", "bench", "plan"])
def test_help_is_written_in_any_locale(encoding: str, verb: str) -> None:
    done = shell(f"tacoctl {verb} --help", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"usage: tacoctl")


def test_a_document_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    document({"a": float("nan"), "b": [float("inf"), 1.5], "c": (1, -float("inf"))})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": [1, None],
    }


def test_a_document_goes_to_a_stdout_of_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    document({"name": "模型 \udce9"}, indent=None)
    assert json.loads(sys.stdout.getvalue()) == {"name": "模型 \udce9"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["completion", "bash"], ["version"], ["keygen", "bob"]])
def test_every_verb_has_one_document(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["--json", "--endpoint", f"ipc://{tmp_path}/none", *arguments]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_a_name_is_the_bytes_that_were_typed() -> None:
    script = "import sys; from tacod_client.text import typed; print(ascii(typed(sys.argv[1])))"
    for environment in ({}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        command = [sys.executable, "-c", script, "模型".encode()]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=True)
        assert done.stdout.decode().strip() == ascii("模型")
    assert typed("caf\udce9") == "caf\udce9"


# --- errors -----------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], int]:
    def program() -> int:
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.ModelNotFound("a\x1b[2J\nb"), 4, "tacoctl: a\\x1b[2J\\nb\n"),
        (errors.RankFailed("a\x1b[2J\nb"), 1, "tacoctl: a\\x1b[2J\nb\n"),
        (OSError(28, "No space left on device", "stdout"), 1, "tacoctl: stdout: No space left on device\n"),
        (OSError("odd"), 1, "tacoctl: odd\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_its_code_and_its_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending.guarded(raising(error)) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error", [ValueError("two\nlines"), RecursionError(), AssertionError(), MemoryError(), KeyError("x")]
)
def test_what_nobody_thought_of_is_a_line_too(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending.guarded(raising(error)) == 1
    told = capsys.readouterr()
    assert told.err.startswith("tacoctl: ")
    assert told.err.count("\n") == 1
    assert isinstance(error, MemoryError) or "test_ending.py:" in told.err


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no/such/folder", ".", "", "nul\0", 300 * "x", "file/below"])
def test_where_no_file_can_be_is_known_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--output"):
        Output(f"{tmp_path}/{name}" if name else "")


def test_a_file_is_new_or_old_until_it_is_written(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_bytes(b"as it was, and longer")
    for path in (new, old):
        with pytest.raises(TacodError, match="lost"), Output(str(path)):
            raise TacodError("lost")
    assert not new.exists()
    assert old.read_bytes() == b"as it was, and longer"
    for path in (new, old):
        with Output(str(path)) as output:
            output.write(b"latent")
        assert path.read_bytes() == b"latent"


@pytest.mark.parametrize("change", ["removed", "moved", "replaced"])
def test_a_file_that_goes_before_it_is_written_is_made_again(tmp_path: Path, change: str) -> None:
    path = tmp_path / "latent"
    with Output(str(path)) as output:
        if change == "moved":
            path.rename(tmp_path / "elsewhere")
        else:
            path.unlink()
        if change == "replaced":
            path.write_bytes(b"another's, and longer")
        output.write(b"latent")
    assert path.read_bytes() == b"latent"


def test_a_file_whose_folder_goes_before_it_is_written_is_kept_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "latent"
    with Output(str(path)) as output:
        path.unlink()
        path.parent.rmdir()
        with pytest.raises(TacodError, match="it was kept as") as caught:
            output.write(b"latent")
    kept = Path(caught.value.message.rpartition(" as ")[2])
    assert kept.read_bytes() == b"latent"
    kept.unlink()


def test_what_another_put_in_the_place_of_an_unwritten_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "latent"
    with Output(str(path)):
        path.unlink()
        path.write_bytes(b"another's")
    assert path.read_bytes() == b"another's"


def test_a_file_is_written_through_a_link_and_with_the_users_mode(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with Output(str(tmp_path / "link")):
        pass
    assert not (tmp_path / "real").exists()
    mask = os.umask(0o027)
    try:
        with Output(str(tmp_path / "link")) as output:
            output.write(b"x")
    finally:
        os.umask(mask)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


def test_what_can_not_be_written_at_last_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(TacodError, match="No space left on device; it was kept as") as caught,
        Output("/dev/full") as out,
    ):
        out.write(b"latent")
    assert [kept.read_bytes() for kept in tmp_path.iterdir()] == [b"latent"]
    assert str(next(tmp_path.iterdir())) in caught.value.message


def test_an_output_may_be_a_device() -> None:
    with Output("/dev/null") as output:
        output.write(b"latent")
    assert Path("/dev/null").is_char_device()
    told: Any = output.written
    assert told
