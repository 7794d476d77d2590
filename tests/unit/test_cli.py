"""``tacoctl``: its verbs, its options before and behind them, its exit codes."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from tacod.config import Group
from tacod_client import errors
from tacod_client.cli import bench, loaded, sample, verbs
from tacod_client.cli.ending import EXIT_CODES
from tacod_client.cli.main import main
from tacod_client.cli.parser import MOST_RANKS, parser
from tacod_client.version import __version__

VERBS = {
    "status": ["status"],
    "stats": ["stats"],
    "models": ["models"],
    "load": ["load", "flux.safetensors"],
    "unload": ["unload", "0123"],
    "sample": ["sample", "0123", "inputs.safetensors"],
    "ps": ["ps"],
    "cancel": ["cancel", "ab-1"],
    "ping": ["ping"],
    "plan": ["plan", "flux.safetensors", "--ranks", "3"],
    "bench": ["bench", "flux.safetensors", "--size", "1024x768", "--size", "2048x2048"],
    "demo": ["demo"],
    "top": ["top"],
    "reload": ["reload"],
    "drain": ["drain", "--wait"],
    "keygen": ["keygen", "alice", "--folder", "/etc/tacod/curve"],
    "doctor": ["doctor"],
    "completion": ["completion", "bash"],
    "version": ["version"],
}
ASKING = ["status", "stats", "models", "load", "ps", "cancel", "ping", "unload", "reload", "drain", "bench"]
CODES = {
    errors.TacodError: 1,
    errors.ConnectionFailed: 3,
    errors.ConnectionLost: 3,
    errors.ProtocolError: 1,
    errors.MessageTooLarge: 1,
    errors.ModelError: 1,
    errors.ModelUnsupported: 1,
    errors.ModelNotFound: 4,
    errors.ModelNotAllowed: 77,
    errors.ModelCorrupt: 1,
    errors.RequestError: 1,
    errors.ArgumentError: 1,
    errors.ConfigInvalid: 78,
    errors.JobNotFound: 4,
    errors.NotAllowed: 77,
    errors.EngineError: 1,
    errors.OutOfMemory: 1,
    errors.RankFailed: 1,
    errors.Cancelled: 1,
    errors.QueueFull: 75,
    errors.Unavailable: 69,
}


def test_every_verb_is_parsed_and_has_something_to_do() -> None:
    assert set(VERBS) <= set(verbs._VERBS)
    for name, arguments in VERBS.items():
        assert parser().parse_args(arguments).verb == name


def test_every_verb_is_known_to_the_parser() -> None:
    shown = parser().format_help()
    assert all(f"\n    {name} " in shown or f"\n    {name}\n" in shown for name in verbs._VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_json_and_endpoint_may_stand_before_and_behind_the_verb(verb: str) -> None:
    arguments = VERBS[verb]
    for given in (
        ["--json", "--endpoint", "ipc:///e", *arguments],
        [*arguments, "--json", "--endpoint", "ipc:///e"],
        ["--json", *arguments, "--endpoint", "ipc:///e"],
        ["--endpoint", "ipc:///e", *arguments, "--json"],
    ):
        args = parser().parse_args(given)
        assert (args.json, args.endpoint) == (True, "ipc:///e")
    assert "json" not in parser().parse_args(arguments)
    assert "endpoint" not in parser().parse_args(arguments)


def test_watch_takes_seconds_and_has_a_default() -> None:
    for verb in ("status", "stats"):
        assert parser().parse_args([verb]).watch is None
        assert parser().parse_args([verb, "--watch"]).watch == 2.0
        assert parser().parse_args([verb, "--watch", "0.5"]).watch == 0.5


def test_plan_has_the_usual_picture_as_its_default() -> None:
    args = parser().parse_args(VERBS["plan"])
    assert (args.ranks, args.size, args.batch, args.text) == (3, (1024, 1024), 1, 512)


def test_bench_takes_several_sizes_and_has_a_default_for_everything() -> None:
    args = parser().parse_args(VERBS["bench"])
    assert (args.model, args.size) == ("flux.safetensors", [(1024, 768), (2048, 2048)])
    args = parser().parse_args(["bench"])
    assert (args.model, args.size, args.batch, args.text, args.rounds) == (None, None, 1, None, 10)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["status", "extra"],
        ["status", "--watch", "0"],
        ["status", "--watch", "nan"],
        ["status", "--watch", "soon"],
        ["load"],
        ["load", "x", "--dtype", "fp4"],
        ["unload"],
        ["cancel"],
        ["plan", "x"],
        ["plan", "x", "--ranks", "0"],
        ["plan", "x", "--ranks", "3", "--size", "1024"],
        ["plan", "x", "--ranks", "3", "--size", "0x0"],
        ["plan", "x", "--ranks", "3", "--memory", "24,,8"],
        ["plan", "x", "--ranks", "3", "--shares", "2,1,0"],
        ["plan", "x", "--ranks", "3", "--shares", "1.5,1,1"],
        ["bench", "x", "--size", "1024"],
        ["bench", "x", "--rounds", "0"],
        ["sample", "x", "y", "--steps", "-1"],
        ["completion", "fish"],
        ["--colour", "status"],
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: tacoctl" in capsys.readouterr().err


def test_every_error_has_its_exit_code_in_the_table() -> None:
    assert {kind.__name__ for kind in CODES} == set(errors.__all__)


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_error_becomes_its_exit_code_and_its_message(
    kind: type[errors.TacodError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> int:
        raise kind("why; what to do")

    monkeypatch.setattr(verbs, "run", fail)
    assert main(["status"]) == CODES[kind]
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "tacoctl: why; what to do\n")


def test_help_tells_the_exit_codes_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"{code} " in shown[shown.index("exit codes:") :] for _, code in EXIT_CODES)


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "run", interrupt)
    assert main(["status"]) == 130


@pytest.mark.parametrize("verb", ASKING)
def test_no_daemon_exits_with_3(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*VERBS[verb], "--endpoint", f"ipc://{tmp_path}/none"]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"tacoctl: no tacod listens at ipc://{tmp_path}/none")


def test_version_is_told_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--endpoint", f"ipc://{tmp_path}/none"]) == 0
    assert capsys.readouterr().out == f"tacoctl {__version__}\ntacod not reachable\n"
    assert main(["--json", "version", "--endpoint", f"ipc://{tmp_path}/none"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tacoctl": __version__, "tacod": None}


def test_plans_and_demos_have_as_many_ranks_as_a_group_may_have() -> None:
    Group.model_validate({"device": "cpu", "ranks": MOST_RANKS})
    with pytest.raises(ValidationError, match="ranks"):
        Group.model_validate({"device": "cpu", "ranks": MOST_RANKS + 1})


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["load", "x", "--lora", "a=abc"], "expected FILE or FILE=STRENGTH with a number, got 'a=abc'"),
        (["load", "x", "--lora", "a=nan"], "with a number, got 'a=nan'"),
        (["load", "x", "--lora", "=1"], "with a number, got '=1'"),
        (["plan", "x", "--ranks", "three"], "expected a whole number from 1 up, got 'three'"),
        (["plan", "x", "--ranks", "0"], "from 1 up, got '0'"),
        (["status", "--watch", "often"], "expected 0.1 to 3600 seconds, got 'often'"),
        (["status", "--watch", "inf"], "seconds, got 'inf'"),
        (["plan", "x", "--ranks", "65"], "expected a whole number from 1 to 64, got '65'"),
        (["demo", "--ranks", "65"], "expected a whole number from 1 to 64, got '65'"),
        (["plan", "x", "--ranks", 5000 * "9"], "from 1 to 64, got '999"),
        (["plan", "x", "--ranks", "3", "--size", "99999999x64"], "each from 16 to 1048576"),
        (["plan", "x", "--ranks", "3", "--size", "²x²"], "expected WIDTHxHEIGHT"),
        (["plan", "x", "--ranks", "3", "--size", "64x64x64"], "expected WIDTHxHEIGHT"),
        (["bench", "--batch", "99999999999"], "expected a whole number from 1 to 2147483647"),
        (["sample", "x", "y", "--seed", "-1"], "expected a whole number from 0 to 2^64 - 1, got '-1'"),
        (["sample", "x", "y", "--seed", str(2**64)], "from 0 to 2^64 - 1"),
        (["sample", "x", "y", "--seed", "1.5"], "from 0 to 2^64 - 1"),
        (["sample", "x", "y", "--cfg", "nan"], "expected a number, got 'nan'"),
        (["sample", "x", "y", "--shift", "0"], "expected a number above 0, got '0'"),
        (["sample", "x", "y", "--shift", "inf"], "expected a number above 0, got 'inf'"),
        (["sample", "x", "y", "--steps", "10001"], "expected a whole number from 1 to 10000"),
        (["unload", ""], "argument model: is empty"),
        (["bench", ""], "argument model: is empty"),
        (["cancel", ""], "argument job: is empty"),
        (["load", ""], "argument path: is empty"),
        (["load", "x", "--lora", ""], "argument --lora: is empty"),
        (["sample", "", "y"], "argument model: is empty"),
        (["sample", "x", ""], "argument inputs: is empty"),
        (["sample", "x", "y", "--output", ""], "argument --output: is empty"),
        (["plan", "", "--ranks", "2"], "argument file: is empty"),
        (["drain", "--endpoint", ""], "argument --endpoint: is empty"),
        (["keygen", "--folder", ""], "argument --folder: is empty"),
        (["install-service", "--prefix", ""], "argument --prefix: is empty"),
        (["doctor", "--config", ""], "argument --config: is empty"),
        (["load", "caf\udce9", "--dtype", "caf\udce9"], "invalid choice"),
    ],
)
def test_what_an_option_wants_is_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_largest_seed_is_one() -> None:
    assert parser().parse_args(["sample", "x", "y", "--seed", str(2**64 - 1)]).seed == 2**64 - 1


def test_a_lora_has_a_file_and_perhaps_a_strength() -> None:
    args = parser().parse_args(["load", "x", "--lora", "a", "--lora", "b=0.5", "--lora", "c=d=-1", "--lora", "e="])
    assert args.lora == [("a", 1.0), ("b", 0.5), ("c=d", -1.0), ("e", 1.0)]


class FakeLoaded:
    """A client of a daemon that holds these models."""

    ids = ("ab01", "ab02", "cd03")

    def __init__(self, endpoint: str | None = None) -> None:
        self.unloaded: list[str] = []

    def __enter__(self) -> FakeLoaded:
        return self

    def __exit__(self, *args: object) -> None: ...

    def status(self) -> dict[str, Any]:
        return {"group": {"world_size": 1}}

    def models(self) -> list[dict[str, Any]]:
        return [{"id": each, "name": "flux", "family": "flux", "path": "/flux"} for each in self.ids]

    def load(self, path: str, **options: Any) -> None:
        raise errors.ModelNotFound(f"{path}: no such file under models.roots")


@pytest.mark.parametrize(
    ("start", "said"),
    [("ab", "'ab' is not unique: ab01, ab02"), ("ef", "'ef' is no loaded model"), ("ab012", "no loaded model")],
)
def test_an_id_of_none_or_several_is_refused(
    start: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By every verb that takes one; what is no id may be a file for those that load."""
    save_file({"positive.context": np.zeros((1, 7, 8), np.float32)}, tmp_path / "inputs")
    for module in (verbs, bench, sample):
        monkeypatch.setattr(module, "Client", FakeLoaded)
    for arguments in (["unload"], ["bench"], ["sample", "--output", f"{tmp_path}/latent"]):
        loads = arguments[0] != "unload" and "unique" not in said
        assert main([*arguments, start, *([f"{tmp_path}/inputs"] if arguments[0] == "sample" else [])]) == 4
        assert ("no such file" if loads else said) in capsys.readouterr().err
    assert not (tmp_path / "latent").exists()


def test_an_empty_id_stands_for_no_model() -> None:
    with pytest.raises(errors.ModelNotFound, match="empty"):
        loaded.find(FakeLoaded(), "")  # type: ignore[arg-type]
    assert loaded.find(FakeLoaded(), "cd") == FakeLoaded().models()[2]  # type: ignore[arg-type]


def with_process(sampling: dict[str, Any]) -> Any:
    """A model of this noise process."""
    return SimpleNamespace(name="m", family="f", sampling=sampling)


FLOW = with_process({"channels": 16, "prediction": "flow"})
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "num_train_timesteps": 1000}
EPSILON = with_process({"channels": 4, "prediction": "epsilon", **BETAS})


@pytest.mark.parametrize("steps", [1, 2, 8, 1000, 1500])
def test_noise_levels_fall_from_the_processes_highest(steps: int) -> None:
    for model, highest in ((FLOW, 1.0), (EPSILON, 157.407)):
        levels = sample.noise_levels(model, steps).tolist()
        assert len(levels) == steps + 1
        assert levels[0] == pytest.approx(highest, rel=1e-5)
        assert levels[-1] == 0
        assert all(high > low for high, low in pairwise(levels))


def test_noise_levels_are_those_of_the_schedule() -> None:
    levels = sample.noise_levels(EPSILON, 1000).tolist()
    signal, expected = 1.0, []
    for step in range(1000):
        signal *= 1 - (1e-4 + (2e-2 - 1e-4) * step / 999)
        expected.append(((1 - signal) / signal) ** 0.5)
    assert levels == pytest.approx([*reversed(expected), 0.0], rel=1e-5)
    assert sample.noise_levels(FLOW, 2).tolist() == pytest.approx([1, 0.75, 0])
    assert sample.noise_levels(FLOW, 2, 1.0).tolist() == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    ("sampling", "shift", "said"),
    [
        ({}, None, "put sigmas"),
        ({"prediction": "v_prediction"}, None, "put sigmas"),
        ({**EPSILON.sampling, "beta_schedule": "cosine"}, None, "put sigmas"),
        (EPSILON.sampling, 3.0, "--shift is for flows"),
    ],
)
def test_noise_of_a_process_that_is_not_known_is_asked_for(sampling: Any, shift: float | None, said: str) -> None:
    """Of a newer daemon's family, or of an older daemon that doesn't tell: another's would be a picture of nothing."""
    with pytest.raises(errors.RequestError, match=said):
        sample.noise_levels(with_process(sampling), 4, shift)


@pytest.mark.parametrize(
    ("sampling", "channels", "shape"),
    [
        (FLOW.sampling, None, (2, 16, 96, 128)),
        (FLOW.sampling, 4, (2, 4, 96, 128)),
        ({"latent": ["B", 128, "H", "W"], "downscale": 16}, None, (2, 128, 48, 64)),
        ({"latent": ["B", 16, "T", "H", "W"], "downscale": 8}, 12, (2, 12, 1, 96, 128)),
        ({"latent": ["B", 16, 1, "H", "W"], "downscale": 8}, None, (2, 16, 1, 96, 128)),
        ({}, None, "give --channels"),
        ({"latent": ["B", 16, "K"]}, None, "put noise into the inputs"),
    ],
)
def test_the_shape_of_latents_is_what_the_daemon_tells(sampling: Any, channels: int | None, shape: Any) -> None:
    """An older daemon tells the channels alone, or nothing."""
    model = with_process(sampling)
    if isinstance(shape, str):
        with pytest.raises(errors.RequestError, match=shape):
            sample.latent_shape(model, 2, (1024, 768), channels)
    else:
        assert sample.latent_shape(model, 2, (1024, 768), channels) == shape


def test_latents_of_a_video_have_the_frames_that_are_asked_for() -> None:
    model = with_process({"latent": ["B", 16, "T", "H", "W"], "downscale": 8})
    assert sample.latent_shape(model, 1, (1024, 768), frames=5) == (1, 16, 5, 96, 128)


@pytest.mark.parametrize("latent", [["B", 16, "H", "W"], ["B", 16, 1, "H", "W"], None])
def test_frames_of_what_has_none_are_refused(latent: list[Any] | None) -> None:
    model = with_process({"latent": latent, "channels": 16, "downscale": 8})
    with pytest.raises(errors.RequestError, match=r"--frames is for videos, and .* makes none; leave it out"):
        sample.latent_shape(model, 1, (1024, 768), frames=5)
    assert math.prod(sample.latent_shape(model, 1, (1024, 768), frames=1)) == 16 * 96 * 128


@pytest.mark.parametrize(
    "end", [errors.ConnectionFailed("gone"), errors.ConnectionLost("gone while it was asked"), "next"]
)
def test_drain_waits_for_this_daemons_end_and_for_no_other(monkeypatch: pytest.MonkeyPatch, end: Any) -> None:
    """A daemon may end between a connection and its answer, and another may start at once."""
    asked = iter(["this", "this", "this", end])

    class FakeClient:
        boot_id = ""

        def __init__(self, endpoint: str | None, timeout_s: float = 5.0, reconnect_s: float | None = None) -> None:
            self.reconnect_s = reconnect_s

        def __enter__(self) -> FakeClient:
            return self

        def __exit__(self, *args: object) -> None: ...

        def drain(self) -> int:
            self.boot_id = next(asked)
            return 0

        def status(self) -> None:
            assert self.reconnect_s == 0, "it would wait for the next daemon"
            answer = next(asked)
            if isinstance(answer, Exception):
                raise answer
            self.boot_id = answer

    monkeypatch.setattr(verbs, "Client", FakeClient)
    monkeypatch.setattr(verbs.time, "sleep", lambda seconds: None)
    assert main(["drain", "--wait"]) == 0
    assert list(asked) == []
