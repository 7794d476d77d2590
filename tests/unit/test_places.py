"""Paths that tacod takes: whatever others have there stays as it is, and what a killed tacod left makes way.

What others may have in a path's place, as far as this was thought of: regular files, also empty ones and such with
another name, folders, symbolic links to each of them, to nothing, and to a socket that somebody listens at, named
pipes, devices, sockets of every type that somebody uses, sockets that somebody has bound and doesn't listen at, by any
spelling of the path, sockets that this user may not connect to, and something that is put there between a look and the
bind, or after it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from made_up_networks import COMFYUI

from tacod.config import Config, ConfigError
from tacod.serving import unix_socket
from tacod.serving.memory_socket import MemorySocket, memory_path
from tacod.serving.places import check, hold
from tacod.serving.unix_socket import PathTaken, UnixSocket


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="tacod-") as path:
        yield Path(path)


@contextmanager
def listening(path: Path, kind: int = socket.SOCK_STREAM, backlog: int = 8) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as theirs:
        theirs.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            theirs.listen(backlog)
        yield theirs


def leave_a_socket(path: Path) -> None:
    """As a process does that is killed."""
    with listening(path):
        pass


def file(path: Path) -> None:
    path.write_text("years of work")


def link_to(target: Callable[[Path], object] | None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        other = path.with_name(path.name + "-target")
        if target is not None:
            target(other)
        path.symlink_to(other)

    return make


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


def full_folder(path: Path) -> None:
    path.mkdir()
    file(path / "notes")


THINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (file, "a regular file"),
    "an empty file": (Path.touch, "a regular file"),
    "a folder": (full_folder, "a folder"),
    "an empty folder": (Path.mkdir, "a folder"),
    "a link to a file": (link_to(file), "a symbolic link to"),
    "a link to a folder": (link_to(Path.mkdir), "a symbolic link to"),
    "a link to nothing": (link_to(None), "a symbolic link to"),
    "a link to a socket that was left": (link_to(leave_a_socket), "a symbolic link to"),
    "a pipe": (os.mkfifo, "a named pipe"),
    "a device": (device, "a device"),
}


def everything(folder: Path) -> dict[str, Any]:
    """All that lies there, and what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        told = path.lstat()
        regular = stat.S_ISREG(told.st_mode)
        found[str(path)] = (told.st_mode, told.st_ino, told.st_mtime_ns, path.read_bytes() if regular else None)
    return found


def config(folder: Path, **more: Any) -> Config:
    return Config.model_validate({"endpoint": f"ipc://{folder}/t.sock", "group": {"device": "cpu"}, **more})


def with_metrics(folder: Path) -> Config:
    return config(folder, metrics={"listen": f"unix:{folder}/m.sock"})


@pytest.mark.parametrize("thing", THINGS)
def test_a_socket_takes_no_place_of_others(folder: Path, thing: str) -> None:
    make, words = THINGS[thing]
    make(folder / "t.sock")
    before = everything(folder)
    with pytest.raises(PathTaken, match=rf"t\.sock is no socket but {words}"):
        UnixSocket(folder / "t.sock")
    with pytest.raises(ConfigError, match=rf"c\.toml:endpoint: .*{words}"):
        check("c.toml", config(folder))
    assert everything(folder) == before


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", ["t.sock.lock", "t.sock.d"])
def test_nor_do_lock_and_private_folder(folder: Path, thing: str, name: str) -> None:
    make, words = THINGS[thing]
    if (name, thing) == ("t.sock.lock", "an empty file"):
        pytest.skip("that will do as a lock, and is kept")
    make(folder / name)
    before = everything(folder)
    for attempt in (lambda: hold(folder / "t.sock").__enter__(), lambda: check("c.toml", config(folder))):
        with pytest.raises(ConfigError, match=rf"endpoint: {folder}/{name}") as caught:
            attempt()
        assert words in str(caught.value) or "tacod didn't make" in str(caught.value)
        assert everything(folder) == before


@pytest.mark.parametrize("thing", THINGS)
def test_nor_does_the_socket_for_shared_memory(folder: Path, thing: str) -> None:
    make, words = THINGS[thing]
    make(folder / "t.sock.memory")
    before = everything(folder)
    with pytest.raises(PathTaken, match=words):
        MemorySocket(folder / "t.sock.memory")
    with pytest.raises(ConfigError, match=rf"c\.toml:endpoint: .*{words}"):
        check("c.toml", config(folder))
    assert everything(folder) == before


def test_what_a_killed_daemon_left_of_it_is_replaced(folder: Path) -> None:
    path = memory_path(folder / "t.sock")
    assert path == folder / "t.sock.memory"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(path))
    check("c.toml", config(folder))
    ours = MemorySocket(path)
    with pytest.raises(PathTaken, match="Address already in use"):
        MemorySocket(path)
    ours.close()
    assert not path.exists()
    assert memory_path(folder / ("t" * 99)) is None, "it would be too long"


@pytest.mark.parametrize("thing", THINGS)
def test_nor_do_metrics_and_uploads(folder: Path, thing: str) -> None:
    make, words = THINGS[thing]
    make(folder / "m.sock")
    before = everything(folder)
    with pytest.raises(ConfigError, match=rf"c\.toml:metrics\.listen: .*{words}"):
        check("c.toml", with_metrics(folder))
    uploads = config(folder, models={"uploads": f"{folder}/m.sock"})
    if "folder" in thing:
        check("c.toml", uploads)
    else:
        with pytest.raises(ConfigError, match=rf"c\.toml:models\.uploads: .*m\.sock is no folder but {words}"):
            check("c.toml", uploads)
    assert everything(folder) == before


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_socket_that_somebody_uses_stays(folder: Path, kind: int) -> None:
    with listening(folder / "t.sock", kind) as theirs:
        before = everything(folder)
        for attempt in (lambda: UnixSocket(folder / "t.sock"), lambda: check("c.toml", config(folder))):
            with pytest.raises((PathTaken, ConfigError), match="listens there"):
                attempt()
        assert everything(folder) == before
        if kind == socket.SOCK_STREAM:
            theirs.accept()[0].close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize(
    "spelling", ["{folder}/t.sock", "{folder}/../{name}/t.sock", "{folder}/link/t.sock", "t.sock", "../{name}/t.sock"]
)
def test_so_does_one_that_somebody_has_bound_and_does_not_listen_at(
    folder: Path, kind: int, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX, kind) as theirs:
        theirs.bind(spelling.format(folder=folder, name=folder.name))
        before = everything(folder)
        for attempt in (lambda: UnixSocket(folder / "t.sock"), lambda: check("c.toml", config(folder))):
            with pytest.raises((PathTaken, ConfigError), match=r"another program (has bound it|listens there)"):
                attempt()
        assert everything(folder) == before
        if kind == socket.SOCK_STREAM:
            theirs.listen()
            with pytest.raises(PathTaken, match="listens there"):
                UnixSocket(folder / "t.sock")
    UnixSocket(folder / "t.sock").socket.close()


def test_so_does_one_that_somebody_speaks_from(folder: Path) -> None:
    with listening(folder / "other"), socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(folder / "t.sock"))
        theirs.connect(str(folder / "other"))
        with pytest.raises(PathTaken, match="another program has bound it"):
            UnixSocket(folder / "t.sock")


@pytest.mark.parametrize("name", ["a\nb", "a b", "é", "0: 00000002 00000000", "\udcff"])
def test_so_does_one_of_any_name(folder: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(os.fsencode(folder / name))
        with pytest.raises(PathTaken, match="another program has bound it"):
            UnixSocket(folder / name)
    UnixSocket(folder / name).socket.close()


def test_a_socket_that_was_left_makes_way_whatever_others_have(folder: Path) -> None:
    """Names that look like its own, and its own name in another container, where it listens."""
    leave_a_socket(folder / "t.sock")
    (folder / "deep").mkdir()
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two, listening(folder / "deep/t.sock"):
        one.bind(str(folder / "t.sock2"))
        two.bind(str(folder / "deep" / "s"))
        (folder / "deep" / "s").unlink()
        UnixSocket(folder / "t.sock").socket.close()


def test_a_table_of_sockets_of_another_container_is_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_a_socket(folder / "t.sock")
    header = b"Num       RefCount Protocol Flags    Type St Inode Path\n"
    listens = b"00000000cc89386a: 00000002 00000000 00010000 0001 01 2373630 %b\n"
    accepted = b"0000000000000000: 00000003 00000000 00000000 0001 03 12 %b\n00000000c7c11db3: 3 0 0 0005 03 2298130\n"
    monkeypatch.setattr(unix_socket, "TABLE", folder / "table")
    path = os.fsencode(folder / "t.sock")
    unix_socket.TABLE.write_bytes(header + accepted % path)
    with pytest.raises(PathTaken, match="another program has bound it"):
        UnixSocket(folder / "t.sock")
    unix_socket.TABLE.write_bytes(header + accepted % path + listens % path)
    UnixSocket(folder / "t.sock").socket.close()


def test_where_the_system_has_no_table_a_socket_that_was_left_makes_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_a_socket(folder / "t.sock")
    monkeypatch.setattr(unix_socket, "TABLE", folder / "nowhere")
    UnixSocket(folder / "t.sock").socket.close()


def test_one_that_is_too_busy_to_answer_does_too(folder: Path) -> None:
    with listening(folder / "t.sock", backlog=0), ExitStack() as stack:
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect_ex(str(folder / "t.sock"))
        with pytest.raises(PathTaken, match="another program listens there"):
            UnixSocket(folder / "t.sock")
        assert (folder / "t.sock").is_socket()


def test_whose_it_is_is_told(folder: Path) -> None:
    with listening(folder / "t.sock"), pytest.raises(PathTaken, match=rf"process {os.getpid()} \("):
        UnixSocket(folder / "t.sock")


def test_a_socket_that_was_left_makes_way(folder: Path) -> None:
    leave_a_socket(folder / "t.sock")
    check("c.toml", config(folder))
    ours = UnixSocket(folder / "t.sock")
    assert stat.S_IMODE((folder / "t.sock").stat().st_mode) == 0o660
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "t.sock"))
    ours.remove()
    ours.socket.close()
    assert everything(folder) == {}


def test_one_that_may_not_be_connected_to_stays(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may")
    with listening(folder / "t.sock"):
        (folder / "t.sock").chmod(0)
        with pytest.raises(PathTaken, match="Permission denied"):
            UnixSocket(folder / "t.sock")
        check("c.toml", config(folder))


def test_who_comes_between_the_look_and_the_bind_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = unix_socket.stale

    def look(path: Path, *more: Any, **options: Any) -> Any:
        found = real(path, *more, **options)
        with suppress(FileNotFoundError):
            path.unlink()
        file(path)
        return found

    monkeypatch.setattr(unix_socket, "stale", look)
    for prepare in (lambda path: None, leave_a_socket):
        prepare(folder / "t.sock")
        with pytest.raises(PathTaken, match="Address already in use by a regular file"):
            UnixSocket(folder / "t.sock")
        assert (folder / "t.sock").read_text() == "years of work"
        (folder / "t.sock").unlink()


def test_what_took_our_place_later_stays_at_the_end(folder: Path) -> None:
    ours = UnixSocket(folder / "t.sock")
    (folder / "t.sock").unlink()
    with listening(folder / "t.sock"):
        ours.remove()
        assert (folder / "t.sock").is_socket()
    ours.socket.close()


# --- the lock and the private folder ----------------------------------------------------------------------------------


def test_endpoint_is_held_by_one_and_named_to_the_other(folder: Path) -> None:
    path = folder / "deep" / "t.sock"
    with hold(path) as private:
        assert private.stat().st_mode & 0o777 == 0o700
        with pytest.raises(ConfigError, match=rf"pid {os.getpid()} already serves {path}"), hold(path):
            pytest.fail("two hold one endpoint")
        assert private.is_dir()
    assert list(path.parent.iterdir()) == []


def test_leavings_of_a_killed_daemon_are_cleared(folder: Path) -> None:
    path, private = folder / "t.sock", folder / "t.sock.d"
    private.mkdir(mode=0o700)
    for name in ("rendezvous-0123456789abcdef", "stacks-0123456789abcdef-11", "stacks-0123456789abcdef-0"):
        (private / name).touch()
    (folder / "t.sock.lock").write_text("99999999\n")
    leave_a_socket(path)
    check("c.toml", config(folder))
    with hold(path) as held:
        assert list(held.iterdir()) == []
        assert (folder / "t.sock.lock").read_text() == f"{os.getpid()}\n"
        ours = UnixSocket(path)
        check("c.toml", config(folder))  # what a tacod that runs has there is no fault
        ours.remove()
        ours.socket.close()
    assert list(folder.iterdir()) == []


def test_an_empty_lock_serves_and_is_kept_as_it_was(folder: Path) -> None:
    """A shell's ``flock`` makes such a file; also a tacod that was killed before it wrote its pid."""
    lock = folder / "t.sock.lock"
    lock.touch(0o600)
    before = lock.stat()
    with hold(folder / "t.sock"):
        assert lock.read_text().startswith(f"{os.getpid()} ")
        with pytest.raises(ConfigError, match=rf"pid {os.getpid()} already serves"), hold(folder / "t.sock"):
            pytest.fail("two hold one endpoint")
        ours = UnixSocket(folder / "t.sock")
        check("c.toml", config(folder))
        ours.remove()
        ours.socket.close()
    assert os.path.samestat(before, lock.stat())
    assert (lock.stat().st_mode, lock.stat().st_size) == (before.st_mode, 0)


def test_so_is_one_under_a_tacod_that_was_killed(folder: Path) -> None:
    lock = folder / "t.sock.lock"
    lock.touch()
    with hold(folder / "t.sock"):
        left = lock.read_text()
    lock.write_text(left.replace(str(os.getpid()), "99999999"))
    with hold(folder / "t.sock"):
        assert lock.read_text() == left
    assert lock.read_text() == ""


def test_unless_somebody_writes_to_it(folder: Path) -> None:
    (folder / "t.sock.lock").touch()
    with hold(folder / "t.sock"):
        file(folder / "t.sock.lock")
    assert (folder / "t.sock.lock").read_text() == "years of work"


def test_and_one_where_the_start_goes_wrong(folder: Path) -> None:
    (folder / "t.sock.lock").touch()
    file(folder / "t.sock.d")
    with pytest.raises(ConfigError, match="private folder"), hold(folder / "t.sock"):
        pytest.fail("taken")
    assert (folder / "t.sock.lock").read_text() == ""


def test_an_empty_lock_that_another_program_holds_is_refused(folder: Path) -> None:
    with open(folder / "t.sock.lock", "w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        before = everything(folder)
        with pytest.raises(ConfigError, match=r"another program holds .*t\.sock\.lock"), hold(folder / "t.sock"):
            pytest.fail("taken")
        assert everything(folder) == before


@pytest.mark.parametrize(
    "content", [b"99\nnotes\n", b"99", b" 99\n", b"99 \n", b"99 in a file\n", b"\xff\n", b"0x99\n", b"9" * 70 + b"\n"]
)
def test_a_lock_that_holds_anything_else_is_somebody_elses(folder: Path, content: bytes) -> None:
    (folder / "t.sock.lock").write_bytes(content)
    with pytest.raises(ConfigError, match="a file that tacod didn't make"), hold(folder / "t.sock"):
        pytest.fail("taken")
    assert (folder / "t.sock.lock").read_bytes() == content


def test_a_lock_by_a_hard_link_is_another_file_too(folder: Path) -> None:
    (folder / "years").write_text("1999\n")
    (folder / "t.sock.lock").hardlink_to(folder / "years")
    with pytest.raises(ConfigError, match="a file that tacod didn't make"), hold(folder / "t.sock"):
        pytest.fail("taken")
    assert (folder / "years").read_text() == "1999\n"


@pytest.mark.parametrize(
    "name", ["notes", "rendezvous", "rendezvous-0.txt", "stacks-0-0-0", ".stacks-0", "rendezvous-x"]
)
def test_a_private_folder_with_a_strangers_file_is_refused_whole(folder: Path, name: str) -> None:
    (folder / "t.sock.d").mkdir(mode=0o700)
    (folder / "t.sock.d" / "rendezvous-00").touch()
    file(folder / "t.sock.d" / name)
    before = everything(folder)
    with pytest.raises(ConfigError, match=rf"t\.sock\.d/{name}"), hold(folder / "t.sock"):
        pytest.fail("taken")
    assert everything(folder) == before


def test_so_is_one_with_a_link_or_a_folder_of_the_right_name(folder: Path) -> None:
    (folder / "t.sock.d").mkdir(mode=0o700)
    file(folder / "theirs")
    odd = folder / "t.sock.d" / "stacks-00-0"
    for make in (lambda: odd.symlink_to(folder / "theirs"), odd.mkdir):
        make()
        with pytest.raises(ConfigError, match="tacod didn't make it"), hold(folder / "t.sock"):
            pytest.fail("taken")
        odd.rmdir() if odd.is_dir() else odd.unlink()
    assert (folder / "theirs").read_text() == "years of work"


def test_what_somebody_puts_there_meanwhile_stays(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with hold(folder / "t.sock") as private:
        file(private / "notes")
        (folder / "t.sock.lock").unlink()
        file(folder / "t.sock.lock")
    assert (private / "notes").read_text() == (folder / "t.sock.lock").read_text() == "years of work"
    assert "t.sock.d stays" in caplog.text


# --- the check --------------------------------------------------------------------------------------------------------


def test_each_path_that_is_taken_has_its_line(folder: Path) -> None:
    for name in ("t.sock", "t.sock.lock", "t.sock.d", "m.sock", "up"):
        file(folder / name)
    asked = config(folder, metrics={"listen": f"unix:{folder}/m.sock"}, models={"uploads": f"{folder}/up"})
    with pytest.raises(ConfigError) as caught:
        check("c.toml", asked)
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        *["c.toml:endpoint:"] * 3,
        "c.toml:metrics.listen:",
        "c.toml:models.uploads:",
    ]


@pytest.mark.parametrize("name", ["t.sock", "t.sock.lock", "t.sock.d", "t.sock.d/m.sock", "same/t.sock"])
def test_metrics_and_endpoint_are_apart(folder: Path, name: str) -> None:
    (folder / "same").symlink_to(folder)
    with pytest.raises(ConfigError, match=r"metrics\.listen: .*where endpoint has its own"):
        check("c.toml", config(folder, metrics={"listen": f"unix:{folder}/{name}"}))


@pytest.mark.parametrize("name", ["t.sock.d/deep/m.sock", "same/t.sock.d/m.sock", "t.sock/m.sock", "into/m.sock"])
def test_at_any_depth(folder: Path, name: str) -> None:
    (folder / "same").symlink_to(folder)
    (folder / "t.sock.d").mkdir(mode=0o700)
    (folder / "into").symlink_to(folder / "t.sock.d")
    with pytest.raises(ConfigError, match=r"metrics\.listen: .*where endpoint has its own"):
        check("c.toml", config(folder, metrics={"listen": f"unix:{folder}/{name}"}))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(
            (name, "endpoint")
            for name in ("t.sock", "t.sock.lock", "t.sock.d", "t.sock.d/up", "same/t.sock.d/up/loads")
        ),
        *((name, "metrics.listen") for name in ("m.sock", "m.sock/up", "same/m.sock")),
    ],
)
def test_uploads_are_apart_from_sockets(folder: Path, name: str, key: str) -> None:
    (folder / "same").symlink_to(folder)
    before = everything(folder)
    asked = config(folder, metrics={"listen": f"unix:{folder}/m.sock"}, models={"uploads": f"{folder}/{name}"})
    with pytest.raises(ConfigError, match=rf"models\.uploads: .*where {key} has its own"):
        check("c.toml", asked)
    assert everything(folder) == before


def test_no_socket_is_within_the_other(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"c\.toml:endpoint: .*where metrics\.listen has its own"):
        check("c.toml", config(folder, metrics={"listen": f"unix:{folder}"}))
    asked = {"endpoint": f"ipc://{folder}/m/t.sock", "metrics": {"listen": f"unix:{folder}/m"}}
    with pytest.raises(ConfigError, match=r"c\.toml:endpoint: .*where metrics\.listen has its own"):
        check("c.toml", Config.model_validate(asked))


@pytest.mark.parametrize("uploads", ["", "/up", "/t.sock.d2", "/t", "/m.sock.d"])
def test_side_by_side_is_apart(folder: Path, uploads: str) -> None:
    """Sockets in the folder of uploads too: nothing there is touched but uploads."""
    check(
        "c.toml",
        config(folder, metrics={"listen": f"unix:{folder}/m.sock"}, models={"uploads": f"{folder}{uploads}"}),
    )


def test_folders_that_are_to_come_are_no_fault(folder: Path) -> None:
    check(
        "c.toml",
        Config.model_validate(
            {
                "endpoint": f"ipc://{folder}/deep/er/t.sock",
                "group": {"device": "cpu"},
                "metrics": {"listen": f"unix:{folder}/deep/er/m.sock"},
                "models": {"uploads": f"{folder}/up/loads"},
            }
        ),
    )
    assert everything(folder) == {}


@pytest.mark.parametrize("make", [file, link_to(None), os.mkfifo], ids=["a file", "a link to nothing", "a pipe"])
def test_a_folder_that_is_none_is_told(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder / "run")
    for asked in (
        {"endpoint": f"ipc://{folder}/run/t.sock"},
        {"metrics": {"listen": f"unix:{folder}/run/m.sock"}},
        {"models": {"uploads": f"{folder}/run/up/loads"}},
    ):
        with pytest.raises(ConfigError, match=rf"{folder}/run is no folder but a "):
            check("c.toml", config(folder, **asked) if "endpoint" not in asked else Config.model_validate(asked))


def test_what_may_not_be_looked_at_is_no_fault_of_a_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever checks it need not be the daemon's user."""

    def deny(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", deny)
    check("c.toml", with_metrics(folder))
    with pytest.raises(ConfigError, match="Permission denied; tacod must own"), hold(folder / "t.sock"):
        pytest.fail("taken")


def test_a_folder_that_is_no_comfyui_is_told(folder: Path) -> None:
    for path, words in ((folder, "has no comfy/model_detection.py"), (folder / "gone", "is no folder")):
        with pytest.raises(ConfigError, match=rf"c\.toml:comfyui\.path: {path} {words}"):
            check("c.toml", config(folder, comfyui={"path": str(path)}))
    check("c.toml", config(folder, comfyui={"path": str(COMFYUI)}))
