"""What ``tacoctl`` shows: whole in any width, as it is in any name, and in any locale."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from tacod_client import units
from tacod_client.cli import show, top
from tacod_client.text import printable

from .test_top import look

ID = "0123456789abcdef"
WIDTHS = [24, 40, 60, 80, 100, 120, 200]


def model(**changes: Any) -> dict[str, Any]:
    """What the daemon tells of a model."""
    return {
        "id": ID,
        "name": "flux1-dev.safetensors",
        "family": "flux",
        "parameters": 11_901_408_320,
        "weight_bytes": 23_802_816_640,
        "patches": 3,
        "dtype": "bf16",
        "loaded_s": 12.34,
        "plan": "sequence 3 (ulysses; 24 heads over 3 ranks: 8 each; 4608 tokens: 1536 each)",
        **changes,
    }


def job(**changes: Any) -> dict[str, Any]:
    """What the daemon tells of a job."""
    told = {"job": "3f2a-17", "verb": "sample", "state": "running", "step": 7, "total": 28, "model": ID}
    return {**told, "client": "python (pid 12345, uid 1000 (somebody))", "age_s": 75.0, **changes}


def shown(value: Any, width: int, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(value)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["flux1-dev.safetensors", 64 * "a" + ".safetensors", 20 * "模型" + ".safetensors"])
def test_ids_and_numbers_are_whole_in_any_width(width: int, name: str) -> None:
    lines = shown(show.models([model(name=name), model(id=ID[::-1], name="other")]), width)
    for whole in (ID, ID[::-1], "flux", "11.9 B", "22.2 GiB", "bf16", "12.3 s"):
        assert any(whole in line for line in lines), whole
    text = "".join("".join(lines).split())
    assert name in text, "a name may be broken, and is never cut"
    assert "".join(model()["plan"].split()) in text
    assert all(Console().render_str(line, markup=False).cell_len <= width for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_jobs_are_whole_in_any_width(width: int) -> None:
    lines = shown(show.jobs([job(), job(job="3f2a-18", state="queued", client=None)]), width)
    for whole in ("3f2a-17", "3f2a-18", ID, "7/28", "1 min 15 s", "queued", "gone"):
        assert any(whole in line for line in lines), whole
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_keep_their_units_in_any_width(width: int) -> None:
    lines = shown(top.frame(look()), width)
    for whole in ("mean 200.0 ms", "p95 400.0 ms", "compute 100.0 ms (50 %)", "6.0 GiB of 24.0 GiB", "87 %", "7/28"):
        assert any(whole in line for line in lines), whole
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_bench_is_whole_in_any_width(width: int) -> None:
    times = {"p10": 0.09, "p50": 0.1, "p90": 0.11}
    split = {"queue_s": 0.001, "wire_s": 0.002, "compute_s": 0.09, "collective_s": 0.007, "client_s": 0.001}
    row = {"size": "2048x2048", "plan": "sequence 3", "one_s": times, "all_s": times, "speedup": 2.5, "error": 1.5e-7}
    told = {"model": model(), "batch": 1, "text": 512, "ranks": 3, "rounds": 10}
    told["sizes"] = [{**row, "split": split, "bound": "the exchange between ranks"}]
    lines = shown(show.bench(told), width)
    for whole in ("2048x2048", "100.0 ms", "2.50", "1.5e-07", "90.0 ms", "512 text tokens"):
        assert any(whole in line for line in lines), whole
    assert all(len(line) <= width for line in lines)


def test_in_a_pipe_a_model_is_one_line() -> None:
    """However long it is: scripts read lines."""
    lines = shown(show.models([model(name=255 * "x", plan=300 * "y ")]), show._PIPE_WIDTH)
    assert len(lines) == 2
    assert lines[1].startswith(f"{ID}  {255 * 'x'}  flux ")


@pytest.mark.parametrize(
    "name",
    [
        "flux[bf16].safetensors",
        "[v2] flux.safetensors",
        "[/] [bold red]x[/bold red]",
        "a\\[b].gguf",
        ":rocket: :x:.safetensors",
        "https://host/x 42 'quoted'",
        "模型 ü é　全角.safetensors",
        "{0} %s $HOME {task.fields[x]}",
        "👩‍👩‍👧.safetensors",
    ],
)
@pytest.mark.parametrize("width", [60, 400])
def test_a_name_is_shown_as_it_is(name: str, width: int) -> None:
    """Whatever the console makes of markup, emoji or numbers elsewhere."""
    frame = look()
    frame["status"]["models"][0]["name"] = name
    for value in (show.models([model(name=name)]), top.frame(frame), show.jobs([job(client=name)])):
        assert any(name in line for line in shown(value, width))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a\nb", "a\\nb"),
        ("a\x1b[31mb\x07", "a\\x1b[31mb\\x07"),
        ("a\r\tb\x00", "a\\r\\tb\\x00"),
        ("caf\udce9", "caf\\udce9"),
        ("left‮right", "left\\u202eright"),
        ("a\u2028b\x85c", "a\\u2028b\\x85c"),
        ("模型 ü", "模型 ü"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(name: str, said: str) -> None:
    assert printable(name) == said
    assert any(said in line for line in shown(show.models([model(name=name)]), 400))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
def test_what_the_locale_lacks_is_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", file)
    monkeypatch.setattr(file, "isatty", lambda: True)
    name = "模型 ü.safetensors"
    file.write("\n".join(shown(show.models([model(name=name)]), 400)))
    file.write("\n".join(shown(top.frame(look()), 400)))
    file.flush()
    told = file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert name.encode(encoding, "backslashreplace").decode(encoding) in told


@pytest.mark.parametrize("columns", ["0", "1", "7", "-3", "", "x", "99999"])
def test_a_terminal_of_any_width_is_taken(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show.out(show.models([model()]))
    assert ID in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def test_a_load_tells_what_was_left_out_a_line_each() -> None:
    notes = ["style: img_in has shape [2]", "style: odd\x1b[2J\nname"]
    first, *lines = show.loaded(model(notes=notes), 1.26).split("\n")
    assert first == f"{ID}  flux1-dev.safetensors: flux, ready in 1.3 s"
    assert lines == [f"a patch was left out: {printable(note)}" for note in notes]
    # A daemon that is older says nothing of them.
    assert show.loaded(model(), 1.26) == first


def test_prefixes_are_shown_where_there_are_any() -> None:
    told = look()
    told["status"]["models"] = [model()]
    told["stats"] |= {"group_restarts": 0, "store": {"bytes": 1, "hits": 2, "misses": 3}}
    one, *others = told["status"]["group"]["ranks"]
    for each in others:
        # A daemon that is older says nothing of them.
        assert "prefix_bytes" not in each
    one["prefix_bytes"] = 2 << 30
    status = shown(show.status(told["status"]), 120)
    assert any("3.0 GiB, 2.0 GiB for prefixes" in line for line in status)
    assert sum("for prefixes" in line for line in status) == 1
    assert not any("prefixes" in line for line in shown(show.stats(told["stats"]), 120))
    told["stats"]["prefix"] = {"hits": 24, "misses": 1}
    assert any(
        re.fullmatch("prefixes +computed for 1 forwards, kept for 24 others", line)
        for line in shown(show.stats(told["stats"]), 120)
    )


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023.4, "1023 B"),
        (1023.5, "1.0 KiB"),
        (1048575.9, "1.0 MiB"),
        (2**30, "1.0 GiB"),
        (2**50, "1048576.0 GiB"),
    ],
)
def test_sizes(count: float, shown: str) -> None:
    """A number that is rounded up to the next unit is shown in that."""
    assert units.size(count) == shown


def test_groups_are_columns_where_there_are_several() -> None:
    def shown(what: Any) -> str:
        console = Console(width=200, file=io.StringIO(), highlight=False)
        console.print(what)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    rank = {"rank": 0, "pid": 7, "memory_used_bytes": 1024, "prefix_bytes": 0}
    groups = [
        {
            "name": name,
            "state": state,
            "world_size": 1,
            "restarts": restarts,
            "queue": {"running": 1, "queued": 2},
            "ranks": [{**rank, "device": f"cpu:{index}"}],
            "models": [],
        }
        for index, (name, state, restarts) in enumerate((("fast", "ready", 0), ("spare", "degraded", 3)))
    ]
    whole = {"device": "cpu", "world_size": 2, "restarts": 3}
    whole["ranks"] = [{**each["ranks"][0], "group": each["name"]} for each in groups]
    told = {"state": "degraded", "version": "1", "pid": 1, "uptime_s": 1.0, "endpoint": "e", "clients": 1, "models": []}
    told |= {"group": whole, "queue": {"running": 2, "queued": 4}}
    one, two = shown(show.status({**told, "groups": groups[:1]})), shown(show.status({**told, "groups": groups}))
    assert one == shown(show.status(told)), "an older daemon tells of no groups"
    assert "group     2 ranks on cpu, 3 restarts" in one
    assert "groups    2, with 2 ranks on cpu, 3 restarts" in two
    lines = [line.split() for line in two.splitlines()]
    assert ["spare", "degraded", "1", "of", "1", "1", "2", "3"] in lines
    assert ["spare", "0", "7", "cpu:1", "1.0", "KiB"] in lines
    whole["ranks"] = [{**each, "host": host} for each, host in zip(whole["ranks"], ("gpu-a", "gpu-b"), strict=True)]
    spread = shown(show.status({**told, "group": {**whole, "asked_ranks": 4}}))
    assert "2 of 4 ranks on cpu, 3 restarts" in spread
    assert ["0", "gpu-b", "7", "cpu:1", "1.0", "KiB"] in [line.split() for line in spread.splitlines()]
    job = {"job": "b-1", "verb": "sample", "state": "running", "step": 1, "total": 2, "model": "m", "client": "c"}
    job["age_s"] = 1.0
    assert shown(show.jobs([job])).split()[0] == "job"
    assert shown(show.jobs([{**job, "group": "spare"}])).split()[0] == "group"


@pytest.mark.parametrize(
    ("count", "shown"), [(999, "999"), (1000, "1.0 k"), (999_949, "999.9 k"), (999_999, "1.0 M"), (12e9, "12.0 B")]
)
def test_counts(count: float, shown: str) -> None:
    assert units.short(count) == shown
