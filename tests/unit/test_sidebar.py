"""The sidebar's routes and what they ask a daemon, without ComfyUI; and the words of the tab."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import eventually

from tacod_client.errors import ConnectionFailed, ModelNotFound, NotAllowed, OutOfMemory, TacodError

NODES = Path(__file__).parents[2] / "comfy_nodes"
WEB = NODES / "web" / "sidebar"
HERE, THERE = "ipc:///here", "ipc:///there"
FAR_S = 60.0


class Daemon:
    """What the panels' clients talk to."""

    def __init__(self) -> None:
        self.asked = 0
        self.open = 0
        self.unloaded: list[str] = []
        self.error: TacodError | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.threads: set[int] = set()

    def client(self, endpoint: str, timeout_s: float, reconnect_s: float) -> Client:
        assert reconnect_s == 0, "a browser waits for nobody's restart"
        self.open += 1
        return Client(self)


class Client:
    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._daemon.open -= 1

    def _answer(self) -> None:
        self._daemon.threads.add(threading.get_ident())
        assert self._daemon.answers.wait(FAR_S)
        if self._daemon.error is not None:
            raise self._daemon.error

    def status(self) -> dict[str, Any]:
        self._answer()
        self._daemon.asked += 1
        return {"state": "ready"}

    def stats(self) -> dict[str, Any]:
        return {"forwards_total": 7}

    def jobs(self) -> list[Any]:
        return []

    def unload(self, model: str) -> None:
        self._answer()
        self._daemon.unloaded.append(model)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The nodes' modules by their names, without ComfyUI."""
    package = ModuleType("nodes_alone")
    package.__path__ = [str(NODES)]
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "nodes_alone", package)
    yield lambda name: importlib.import_module(f"nodes_alone.{name}")
    for name in set(sys.modules) - before:
        if name.startswith("nodes_alone"):
            sys.modules.pop(name, None)


@pytest.fixture
def daemon(nodes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Daemon:
    daemon = Daemon()
    monkeypatch.setattr(nodes("panel"), "Client", daemon.client)
    # Nothing gets old and nothing is closed but where a test says so.
    monkeypatch.setattr(nodes("panel"), "PERIOD_S", FAR_S)
    monkeypatch.setattr(nodes("panel"), "IDLE_S", FAR_S)
    return daemon


@pytest.fixture
def panels(nodes: Callable[[str], Any], daemon: Daemon) -> Any:
    return nodes("panel").Panels(lambda: [HERE, THERE])


@pytest.fixture
def routes(nodes: Callable[[str], Any], panels: Any) -> Any:
    return nodes("routes").Routes(panels)


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + FAR_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


# --- asking -----------------------------------------------------------------------------------------------------------


def test_many_browsers_are_one_question(panels: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async def browse() -> None:
        told = await asyncio.gather(*(panels.snapshot("") for _ in range(10)))
        told.append(await panels.snapshot(HERE))
        assert daemon.asked == 1
        for each in told:
            assert each["endpoint"] == HERE
            assert each["endpoints"] == [HERE, THERE]
            assert each["status"] == {"state": "ready"}
            assert each["stats"] == {"forwards_total": 7}
            assert each["error"] is None
            assert each["last_run"] is None
        await panels.snapshot(THERE)
        assert daemon.asked == 2
        monkeypatch.setattr(sys.modules["nodes_alone.panel"], "PERIOD_S", 0.0)
        await panels.snapshot(HERE)
        assert daemon.asked == 3
        assert daemon.open == 2, "each daemon has one connection, which stays"

    asyncio.run(browse())
    assert threading.get_ident() not in daemon.threads


def test_the_event_loop_goes_on_while_a_daemon_is_slow(
    panels: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["nodes_alone.panel"], "PERIOD_S", 0.0)
    daemon.answers.clear()

    async def browse() -> None:
        gone, *others = (asyncio.create_task(panels.snapshot("")) for _ in range(3))
        await until(lambda: daemon.threads)
        gone.cancel()
        await asyncio.sleep(0)
        assert gone.cancelled()
        assert not any(each.done() for each in others)
        daemon.answers.set()
        assert [(await each)["status"]["state"] for each in others] == ["ready", "ready"]

    asyncio.run(browse())
    assert daemon.asked == 1, "old or not, nothing is asked twice at once"


def test_a_daemon_that_is_away_is_told_and_found_again(
    panels: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["nodes_alone.panel"], "PERIOD_S", 0.0)
    daemon.error = ConnectionFailed("nobody listens; start it")

    async def browse() -> None:
        told = await panels.snapshot("")
        assert told["status"] is None
        assert told["error"] == {"code": "ConnectionFailed", "message": "nobody listens; start it"}
        assert daemon.open == 0
        daemon.error = None
        assert (await panels.snapshot(""))["status"] == {"state": "ready"}

    asyncio.run(browse())


def test_a_connection_that_nobody_uses_is_closed(panels: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["nodes_alone.panel"], "IDLE_S", 0.01)
    monkeypatch.setattr(sys.modules["nodes_alone.panel"], "PERIOD_S", 0.0)

    async def browse() -> None:
        await panels.snapshot("")
        await until(lambda: daemon.open == 0)
        # On a busy machine the next one would be closed before it is seen.
        monkeypatch.setattr(sys.modules["nodes_alone.panel"], "IDLE_S", FAR_S)
        await panels.snapshot("")
        assert daemon.open == 1

    asyncio.run(browse())


def test_only_daemons_of_this_comfyui_are_asked(routes: Any, daemon: Daemon) -> None:
    code, told = asyncio.run(routes.status(SimpleNamespace(query={"endpoint": "tcp://elsewhere:22"})))
    assert code == 404
    assert "tcp://elsewhere:22" in told["error"]["message"]
    assert HERE in told["error"]["message"]
    assert daemon.open == daemon.asked == 0
    code, told = asyncio.run(routes.status(SimpleNamespace(query={"endpoint": THERE})))
    assert (code, told["endpoint"]) == (200, THERE)


def test_the_default_daemon_comes_first(nodes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACOD_ENDPOINT", HERE)
    clients = nodes("clients")
    assert clients.endpoints() == [HERE]
    for endpoint in (THERE, ""):
        clients.client_of(endpoint).close()
    assert clients.endpoints() == [HERE, THERE]


def test_the_last_run_is_that_of_its_daemon(nodes: Callable[[str], Any], panels: Any, daemon: Daemon) -> None:
    record = nodes("record")
    call = SimpleNamespace(
        **dict.fromkeys(("queue_s", "wire_s", "compute_s", "collective_s", "client_s"), 0.25),
        seconds=2.0,
        ranks=2,
        plan="sequence 2",
        attempts=1,
        single_rank_s=3.0,
    )
    kept = record.Record()

    class Model:
        """The daemon tells of its last call when that is asked for."""

        def hear_last(self, hear: Callable[[Any], None]) -> None:
            self.settle()
            self.hear = hear

        def settle(self) -> None:
            if hasattr(self, "hear"):
                self.hear(call)
                del self.hear

    model = Model()
    kept.add(model)  # no sampling has begun
    kept.begin(THERE, "flux.safetensors", "flux")
    kept.add(model)
    kept.add(model)
    told = asyncio.run(panels.snapshot(THERE))["last_run"]
    assert told["model"] == "flux.safetensors"
    assert (told["forwards"], told["plan"], told["forward_s"], told["single_rank_s"]) == (2, "sequence 2", 4.0, 6.0)
    assert asyncio.run(nodes("panel").Panels(lambda: [HERE]).snapshot(""))["last_run"] is None
    kept.begin(THERE, "flux.safetensors", "flux")
    assert record.latest[THERE].to_wire()["forwards"] == 0


# --- unloading --------------------------------------------------------------------------------------------------------

GOOD = {"Host": "comfy:8188", "Origin": "http://comfy:8188", "Sec-Fetch-Site": "same-origin"}


def request(
    body: Any = None, headers: dict[str, str] | None = None, kind: str = "application/json", length: Any = 0
) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body or {"endpoint": HERE, "model": "m1"}).encode()

    async def read() -> bytes:
        return data

    return SimpleNamespace(
        headers=GOOD if headers is None else headers,
        content_type=kind,
        content_length=len(data) if length == 0 else length,
        read=read,
    )


@pytest.mark.parametrize(
    "headers",
    [
        GOOD,
        {},
        {"Host": "comfy:8188", "Origin": "http://comfy:8188"},
        {"Host": "10.0.0.1:8188", "Origin": "https://comfy.example", "Sec-Fetch-Site": "same-origin"},
    ],
    ids=["browser", "no browser", "old browser", "behind a proxy"],
)
def test_a_model_is_unloaded(routes: Any, daemon: Daemon, headers: dict[str, str]) -> None:
    assert asyncio.run(routes.unload(request(headers=headers))) == (200, {"model": "m1"})
    assert daemon.unloaded == ["m1"]
    assert daemon.open == 0
    assert threading.get_ident() not in daemon.threads


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        (403, request(headers={**GOOD, "Sec-Fetch-Site": "cross-site"})),
        (403, request(headers={**GOOD, "Sec-Fetch-Site": "same-site"})),
        (403, request(headers={"Host": "comfy:8188", "Origin": "http://evil.example"})),
        (403, request(headers={"Host": "comfy:8188", "Origin": "http://comfy:9999"})),
        (403, request(headers={"Host": "comfy:8188", "Origin": "null"})),
        (403, request(headers={"Host": "comfy:8188", "Origin": "http://[comfy:8188"})),
        (415, request(kind="text/plain")),
        (415, request(kind="application/x-www-form-urlencoded")),
        (413, request(length=None)),
        (413, request({"endpoint": HERE, "model": "m" * 5000})),
        (400, request(b"{")),
        (400, request(b"\xff")),
        (400, request(b"[" * 4000)),
        (400, request([1])),
        (400, request({"endpoint": HERE})),
        (400, request({"endpoint": HERE, "model": 1})),
        (400, request({"endpoint": HERE, "model": "m1", "more": ""})),
        (404, request({"endpoint": "ipc:///elsewhere", "model": "m1"})),
        (404, request({"endpoint": "", "model": "m1"})),
    ],
)
def test_what_is_refused_reaches_no_daemon(routes: Any, daemon: Daemon, code: int, asked: Any) -> None:
    got, told = asyncio.run(routes.unload(asked))
    assert got == code
    assert told["error"]["message"]
    assert daemon.unloaded == []
    assert daemon.open == 0
    assert not daemon.threads


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelNotFound("no such model", model="m1"), 404),
        (NotAllowed("not yours"), 403),
        (ConnectionFailed("nobody there"), 503),
        (OutOfMemory("no room"), 502),
    ],
)
def test_the_daemons_reason_is_told(routes: Any, daemon: Daemon, error: TacodError, code: int) -> None:
    daemon.error = error
    told = {"error": {"code": type(error).__name__, "message": error.message}}
    assert asyncio.run(routes.unload(request())) == (code, told)
    assert daemon.open == 0


def test_an_unload_waits_and_nobody_waits_for_it(routes: Any, panels: Any, daemon: Daemon) -> None:
    async def browse() -> None:
        await panels.snapshot("")
        daemon.answers.clear()
        daemon.threads.clear()
        waiting = asyncio.create_task(routes.unload(request()))
        await until(lambda: daemon.threads)
        assert (await panels.snapshot(""))["status"] == {"state": "ready"}
        code, told = await routes.unload(request())
        assert (code, told["error"]["code"]) == (409, "UnloadUnderWay")
        daemon.answers.set()
        assert await waiting == (200, {"model": "m1"})
        assert daemon.unloaded == ["m1"]
        assert daemon.asked == 1
        await panels.snapshot("")
        assert daemon.asked == 2, "what was known before the unload is no answer"

    asyncio.run(browse())


# --- on ComfyUI's server ----------------------------------------------------------------------------------------------


class Table:
    """Stands for aiohttp's table of routes."""

    def __init__(self) -> None:
        self.handlers: dict[tuple[str, str], Callable[[Any], Awaitable[Any]]] = {}

    def __getattr__(self, method: str) -> Any:
        return lambda path: lambda handler: self.handlers.update({(method, path): handler})


def test_the_routes_are_put_on_comfyuis_server(
    nodes: Callable[[str], Any], daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = nodes("routes")
    routes.register()  # there is no server
    table = Table()
    server = ModuleType("server")
    server.PromptServer = SimpleNamespace(instance=SimpleNamespace(routes=table))  # type: ignore[attr-defined]
    aiohttp = ModuleType("aiohttp")
    aiohttp.web = SimpleNamespace(  # type: ignore[attr-defined]
        json_response=lambda body, status, headers: (status, body, headers)
    )
    monkeypatch.setitem(sys.modules, "server", server)
    monkeypatch.setitem(sys.modules, "aiohttp", aiohttp)
    monkeypatch.setenv("TACOD_ENDPOINT", HERE)
    routes.register()
    assert set(table.handlers) == {("get", "/taco_dit/status"), ("post", "/taco_dit/unload")}
    asked = table.handlers["get", "/taco_dit/status"](SimpleNamespace(query={}))
    code, body, headers = asyncio.run(asked)  # type: ignore[arg-type]
    assert (code, body["endpoint"], headers) == (200, HERE, {"Cache-Control": "no-store"})


def test_a_thread_whose_loop_has_ended_is_no_error(nodes: Callable[[str], Any], daemon: Daemon) -> None:
    panel = nodes("panel").Panel(HERE)
    daemon.answers.clear()

    async def leave() -> None:
        asking = asyncio.create_task(panel.snapshot())
        await until(lambda: daemon.threads)
        asking.cancel()

    asyncio.run(leave())
    daemon.answers.set()
    eventually(lambda: daemon.asked, FAR_S, "the thread ends")
    eventually(
        lambda: all(each.name != "taco-dit panel" for each in threading.enumerate()), FAR_S, "the thread is gone"
    )


# --- the words --------------------------------------------------------------------------------------------------------

WORDS: dict[str, dict[str, str]] = {each: json.loads((WEB / f"{each}.json").read_text()) for each in ("en", "zh")}


def test_both_languages_say_the_same() -> None:
    gaps = {name: {key: set(re.findall(r"\{(\w+)\}", text)) for key, text in WORDS[name].items()} for name in WORDS}
    assert gaps["en"] == gaps["zh"]
    assert all(text for words in WORDS.values() for text in words.values())
    same = {key for key, text in WORDS["en"].items() if WORDS["zh"][key] == text}
    assert same == set()


def test_what_the_code_says_has_words() -> None:
    code = "".join(path.read_text() for path in WEB.glob("*.js"))
    said = set(re.findall(r'\bt\(\s*(?:\w+ \? )?"([\w.]+)"', code)) | set(re.findall(r'"(help\.\w+)"', code))
    said |= set(re.findall(r'\bt\(\s*\w+ \? "[\w.]+" : "([\w.]+)"', code))
    families = set(re.findall(r"`(\w+)\.\$\{", code))
    assert {"state", "about", "part", "job"} == families
    unsaid = {key for key in WORDS["en"] if key not in said and key.partition(".")[0] not in families}
    assert said <= set(WORDS["en"])
    assert unsaid == set()
    assert {f"part.{part}" for part in ("queue", "wire", "compute", "collective")} <= set(WORDS["en"])


def test_every_state_of_the_daemon_has_words() -> None:
    from tacod.observe.exporter import STATES

    for state in STATES:
        assert f"state.{state}" in WORDS["en"]
        assert state == "ready" or f"about.{state}" in WORDS["en"]
