"""Whatever is wrong with a request costs its sender a typed error that names it, and nobody else anything."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import zmq
from helpers import FLUX, SD3, Daemon
from safetensors.torch import save_file

from tacod_client import (
    ArgumentError,
    Client,
    Model,
    ModelCorrupt,
    ModelNotAllowed,
    ModelNotFound,
    ModelUnsupported,
    TacodError,
    wire,
)

SOON_S = 1.0


@contextmanager
def unharmed(client: Client) -> Iterator[Model]:
    """Within, something is refused within a second; afterwards the next forward is right and no model came or went."""
    model = client.load(FLUX.file)
    before = [told["id"] for told in client.models()]
    started = time.monotonic()
    yield model
    assert time.monotonic() - started < SOON_S
    assert [told["id"] for told in client.models()] == before
    FLUX.check(model)


FORWARDS: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("x", lambda good: {"x": good["x"][:, :3]}),
    ("x", lambda good: {"x": good["x"][0]}),
    ("x", lambda good: {"x": good["x"][..., :0]}),
    ("x", lambda good: {"x": good["x"].int()}),
    ("x", lambda good: {"x": good["x"].to(torch.complex64)}),
    ("x", lambda good: {"x": None}),
    ("x", lambda good: {"x": 3.0}),
    ("context", lambda good: {"context": good["context"][..., :7]}),
    ("context", lambda good: {"context": good["context"].long()}),
    ("context", lambda good: {"context": None}),
    ("context", lambda good: {"context": [good["context"]]}),
    ("context", lambda good: {"context": "a cat"}),
    ("context", lambda good: {"context": object()}),
    ("context", lambda good: {"context": np.zeros((1, 5, 8), np.dtype("complex64"))}),
    ("context", lambda good: {"context": torch.cat([good["context"]] * 2)}),
    ("timestep", lambda good: {"timestep": good["timestep"][:0]}),
    ("timestep", lambda good: {"timestep": 0.5}),
    ("y", lambda good: {"y": good["y"][:, :5]}),
    ("y", lambda good: {"y": good["y"].long()}),
    ("guidance", lambda good: {"guidance": None}),
    ("guidance", lambda good: {"guidance": good["guidance"].repeat(2)}),
    ("ref_latents", lambda good: {"ref_latents": good["x"]}),
    ("ref_latents", lambda good: {"ref_latents": [good["x"][:, :3]]}),
    ("ref_latents_method", lambda good: {"ref_latents_method": "sideways"}),
    ("control", lambda good: {"control": good["x"]}),
    ("attention_mask", lambda good: {"attention_mask": good["x"].bool()}),
]


@pytest.mark.parametrize(("argument", "spoil"), FORWARDS, ids=lambda value: value if isinstance(value, str) else "")
def test_forward(client: Client, argument: str, spoil: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    good = FLUX.inputs()
    with unharmed(client) as model, pytest.raises(ArgumentError) as caught:
        model.forward(**{**good, **spoil(good)})
    assert caught.value.argument == argument
    assert caught.value.message.startswith(f"{argument}: ")


SAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("sigmas", {"sigmas": [1.0, float("nan"), 0.0]}),
    ("sigmas", {"sigmas": [1.0, float("inf"), 0.0]}),
    ("sigmas", {"sigmas": [0.0, 0.5, 1.0]}),
    ("sigmas", {"sigmas": [1.0, 0.5, 0.5, 0.0]}),
    ("sigmas", {"sigmas": [2.0, 1.0, 0.0]}),
    ("sigmas", {"sigmas": [1.0, 0.0, -0.1]}),
    ("sigmas", {"sigmas": [1.0]}),
    ("sigmas", {"sigmas": []}),
    ("sigmas", {"sigmas": [[1.0, 0.0]]}),
    ("sampler", {"sampler": "eulr"}),
    ("negative", {"cfg": 4.0}),
    ("cfg", {"cfg": float("nan")}),
    ("seed", {"seed": -1}),
    ("noise", {"noise": (1, 3, 8, 8)}),
    ("latent", {"latent": (1, 4, 8, 6)}),
    ("latent", {"latent": (2, 4, 8, 8)}),
    ("positive.context", {"positive": {"context": (1, 5, 7), "y": (1, 6)}}),
    ("positive.context", {"positive": {"y": (1, 6)}}),
    ("positive.guidance", {"positive": {"context": (1, 5, 8), "y": (1, 6), "guidance": (1,)}}),
    ("negative.y", {"cfg": 4.0, "negative": {"context": (1, 5, 8), "y": (1, 7)}}),
    ("negative.context", {"cfg": 4.0, "negative": {"context": (2, 5, 8), "y": (1, 6)}}),
]


@pytest.mark.parametrize(("argument", "spoiled"), SAMPLES, ids=lambda value: value if isinstance(value, str) else "")
def test_sample(client: Client, argument: str, spoiled: dict[str, Any]) -> None:
    def ones(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ones(item) for key, item in value.items()}
        return np.ones(value, np.float32) if isinstance(value, tuple) else value

    good = {
        "noise": (1, 4, 8, 8),
        "latent": (1, 4, 8, 8),
        "sigmas": [1.0, 0.5, 0.0],
        "positive": {"context": (1, 5, 8), "y": (1, 6)},
    }
    request = ones({**good, **spoiled})
    request["sigmas"] = np.array(request["sigmas"], np.float32)
    other = client.load(SD3.file)
    with unharmed(client), pytest.raises(ArgumentError) as caught:
        other.sample(**request).result()
    assert caught.value.argument == argument
    if argument == "sampler":
        assert "euler, " in caught.value.message
        assert "heun" in caught.value.message


@pytest.mark.parametrize("plan", ["fast", {"sequence": 7}, {"sequence": "2"}, {"cfg": 2}, {}, None, 2, [["sequence"]]])
def test_plan(client: Client, plan: Any) -> None:
    with unharmed(client), pytest.raises(ArgumentError) as caught:
        client.load(FLUX.file, plan=plan)
    assert caught.value.argument == "plan"


@pytest.mark.parametrize("dtype", ["fp64", "int8", "", 32])
def test_dtype(client: Client, dtype: Any) -> None:
    with unharmed(client), pytest.raises(ArgumentError, match="fp32") as caught:
        client.load(FLUX.file, dtype=dtype)
    assert caught.value.argument == "dtype"


KEY = "img_in.weight"


@pytest.mark.parametrize(
    ("patch", "error", "named"),
    [
        ("lora", ArgumentError, "patches[0]"),
        ({}, ArgumentError, "patches[0].key"),
        ({"key": "nowhere.weight", "kind": "diff", "diff": torch.zeros(1)}, ArgumentError, "nowhere.weight"),
        ({"key": KEY, "kind": "diff", "diff": torch.zeros(3, 3)}, ArgumentError, KEY),
        ({"key": KEY, "kind": "oft", "value": torch.zeros(3)}, ModelUnsupported, "oft"),
        ({"key": KEY, "kind": "diff", "diff": torch.zeros(80, 16), "strength": "much"}, ArgumentError, "strength"),
        ({"path": "nowhere.safetensors", "strength": 1.0}, ModelNotFound, "nowhere.safetensors"),
        ({"path": "/etc/passwd", "strength": 1.0}, ModelNotAllowed, "/etc/passwd"),
    ],
)
def test_patches(client: Client, patch: Any, error: type[TacodError], named: str) -> None:
    client.load(FLUX.file)
    with unharmed(client), pytest.raises(error, match=re.escape(named)):
        client.load(FLUX.file, patches=[patch])


def raw_safetensors(header: dict[str, Any], contents: bytes) -> bytes:
    """A safetensors file as it lies on the disk."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + contents


def make_unet(path: Path) -> None:
    keys = {
        "input_blocks.0.0.weight": (4, 4, 3, 3),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (2, 2048),
        "middle_block.0.in_layers.0.weight": (4,),
    }
    save_file({f"model.diffusion_model.{key}": torch.zeros(shape) for key, shape in keys.items()}, path)


def make_incomplete(path: Path) -> None:
    weights = {key: value for key, value in FLUX.model.state_dict().items() if not key.startswith("final_layer.adaLN")}
    save_file(weights, path, metadata={"tacod.config": json.dumps(FLUX.config)})


def make_odd_family(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path, metadata={"tacod.config": '{"image_model": "pixeldream"}'})


def make_truncated(path: Path) -> None:
    whole = (path.parent / FLUX.file).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


FILES: dict[str, tuple[type[TacodError], str, Callable[[Path], object]]] = {
    "unet.safetensors": (ModelUnsupported, "UNet.*SDXL", make_unet),
    "incomplete.safetensors": (ModelCorrupt, "lacks final_layer", make_incomplete),
    "other.safetensors": (ModelUnsupported, "pixeldream", make_odd_family),
    "unknown.safetensors": (ModelUnsupported, "no family", lambda path: save_file({"a": torch.zeros(2)}, path)),
    "truncated.safetensors": (ModelCorrupt, "truncated", make_truncated),
    "empty.safetensors": (ModelCorrupt, "no whole safetensors", lambda path: path.write_bytes(b"")),
    "zeros.safetensors": (ModelCorrupt, "no whole safetensors", lambda path: path.write_bytes(bytes(4096))),
    "huge.safetensors": (ModelCorrupt, "no whole safetensors", lambda path: path.write_bytes(b"\xff" * 64)),
    "text.safetensors": (ModelCorrupt, "not JSON", lambda path: path.write_bytes(struct.pack("<Q", 8) + b"nonsense")),
    "list.safetensors": (ModelCorrupt, "JSON object", lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]")),
    "nested.safetensors": (
        ModelCorrupt,
        "nested",
        lambda path: path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
    ),
    "bomb.safetensors": (
        ModelCorrupt,
        "hold",
        lambda path: path.write_bytes(
            raw_safetensors({"a": {"dtype": "F32", "shape": [1 << 40] * 3, "data_offsets": [0, 4]}}, bytes(4))
        ),
    ),
    "negative.safetensors": (
        ModelCorrupt,
        "'a'",
        lambda path: path.write_bytes(
            raw_safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, bytes(4))
        ),
    ),
    "model.ckpt": (ModelUnsupported, "pickle", lambda path: path.write_bytes(b"\x80\x04.")),
    "model.gguf": (ModelCorrupt, "GGUF", lambda path: path.write_bytes(b"GGUF")),
    "folder": (ModelUnsupported, "folder", lambda path: path.mkdir()),
    "link.safetensors": (ModelNotAllowed, r"models\.roots", lambda path: path.symlink_to("/etc/passwd")),
    "loop.safetensors": (ModelNotFound, "loop", lambda path: path.symlink_to(path.name)),
    "dangling.safetensors": (ModelNotFound, "no such file", lambda path: path.symlink_to("nowhere.safetensors")),
}


@pytest.mark.parametrize("name", FILES)
def test_file(client: Client, models: Path, name: str) -> None:
    kind, words, make = FILES[name]
    path = models / name
    if not path.is_symlink() and not path.exists():
        make(path)
    with unharmed(client), pytest.raises(kind, match=f"(?s){words}") as caught:
        client.load(name)
    assert name in caught.value.message or kind is ModelUnsupported


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("missing.safetensors", ModelNotFound),
        ("", ModelNotFound),
        ("a\0b", ModelNotFound),
        ("x" * 300, ModelNotFound),
        ("/etc/passwd", ModelNotAllowed),
        ("../../../etc/passwd", ModelNotAllowed),
        ("/dev/zero", ModelNotAllowed),
    ],
)
def test_path(client: Client, path: str, kind: type[TacodError]) -> None:
    with unharmed(client), pytest.raises(kind):
        client.load(path)


def packed(**changes: Any) -> bytes:
    """A message's header frame, with some fields changed; ``None`` takes a field away."""
    header = {"type": "ping", "id": 7, "session": b"", "tensors": [], "body": {}, **changes}
    return bytes(msgpack.packb({key: value for key, value in header.items() if value is not None}))


HEAD = b"TACO\x01"
TENSOR = {"dtype": "F32", "shape": [2]}
REF = msgpack.ExtType(1, bytes(4))
JUNK: dict[str, tuple[list[bytes], str]] = {
    "one frame": ([HEAD], "at least 2 frames"),
    "empty frames": ([b"", b""], "frame 0"),
    "a thousand empty frames": ([b""] * 1000, "frame 0"),
    "an HTTP request": ([b"GET / HTTP/1.1\r\n", b"Host: x\r\n"], "frame 0"),
    "another version": ([b"TACO\x63", packed()], "protocol version 99"),
    "no msgpack": ([HEAD, b"\xc1\xff" * 50], "frame 1"),
    "truncated msgpack": ([HEAD, packed()[:-3]], "frame 1"),
    "deep msgpack": ([HEAD, b"\x91" * 100_000], "frame 1"),
    "no map": ([HEAD, msgpack.packb([1, 2])], "expected a msgpack map"),
    "a field missing": ([HEAD, packed(session=None)], "'session'"),
    "a field too many": ([HEAD, packed(extra=1)], "'extra'"),
    "a field of another type": ([HEAD, packed(body=[])], "body"),
    "an unknown type": ([HEAD, packed(type="format")], "'format'"),
    "a negative id": ([HEAD, packed(id=-1)], "id"),
    "a deep body": ([HEAD, packed(body={"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]})], "nested"),
    "an unknown dtype": ([HEAD, packed(tensors=[{"dtype": "F33", "shape": [1]}])], "F33"),
    "a negative size": ([HEAD, packed(tensors=[{"dtype": "F32", "shape": [-1]}])], "shape"),
    "a huge size": ([HEAD, packed(tensors=[{"dtype": "F32", "shape": [1 << 40, 1 << 40]}])], "shape"),
    "too few bytes": ([HEAD, packed(tensors=[TENSOR], body={"x": REF}), bytes(7)], r"tensors\[0\]"),
    "no bytes": ([HEAD, packed(tensors=[TENSOR], body={"x": REF})], r"tensors\[0\]"),
    "a frame left over": ([HEAD, packed(), b"rest"], "left over"),
    "a tensor that nobody names": ([HEAD, packed(tensors=[TENSOR]), bytes(8)], "exactly once"),
    "a tensor named that isn't there": ([HEAD, packed(body={"x": REF})], "tensor 0"),
    "a bad digest": ([HEAD, packed(tensors=[{**TENSOR, "digest": b"short"}], body={"x": REF}), bytes(8)], "digest"),
}


@contextmanager
def raw_socket(daemon: Daemon) -> Iterator[Callable[[list[bytes]], wire.Message]]:
    """Send frames as they are, and get what the daemon answers."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(daemon.endpoint)

    def ask(frames: list[bytes]) -> wire.Message:
        socket.send_multipart(frames)
        assert socket.poll(int(SOON_S * 1000)), "no answer"
        return wire.decode(socket.recv_multipart())

    try:
        yield ask
    finally:
        socket.close()
        context.term()


@pytest.mark.parametrize("case", JUNK)
def test_junk(daemon: Daemon, client: Client, case: str) -> None:
    frames, words = JUNK[case]
    with raw_socket(daemon) as ask:
        with unharmed(client):
            answer = ask(frames)
        assert answer.type == "error"
        error = TacodError.from_wire(answer.body)
        assert type(error).__name__ == "ProtocolError"
        with pytest.raises(type(error), match=words):
            raise error


def test_a_session_belongs_to_its_connection(daemon: Daemon, client: Client) -> None:
    with unharmed(client), raw_socket(daemon) as ask, raw_socket(daemon) as other:
        hello = {"client": "test", "pid": 1, "version": "0"}
        welcome = ask([HEAD, packed(type="hello", body=hello)])
        session = welcome.body["session"]
        assert ask([HEAD, packed(session=session)]).type == "done"
        assert other([HEAD, packed(session=session)]).type == "unknown_session"
        assert other([HEAD, packed(session=b"guess")]).type == "unknown_session"


def test_requests_with_bad_bodies(daemon: Daemon, client: Client) -> None:
    with unharmed(client), raw_socket(daemon) as ask:
        session = ask([HEAD, packed(type="hello", body={"client": "t", "pid": 1, "version": "0"})]).body["session"]
        for kind, body, argument in (
            ("ping", {"extra": 1}, "extra"),
            ("load", {"path": 5, "dtype": None, "patches": None, "plan": "auto"}, "path"),
            ("load", {"path": "x"}, "dtype"),
            ("cancel", {"job": 3, "request": None}, "job"),
            ("forward", {"model": "m", "plan": "auto", "arguments": []}, "arguments"),
            ("put", {"tensors": [1]}, "tensors.0"),
            ("hello", {"client": "x" * 5000, "pid": 1, "version": "0"}, "client"),
        ):
            answer = ask([HEAD, packed(type=kind, session=session, body=body)])
            assert (answer.type, answer.body["code"], answer.body["details"]["argument"]) == (
                "error",
                "ArgumentError",
                argument,
            )
        answer = ask([HEAD, packed(type="forward", session=session, body={"model": "m", "plan": 0, "arguments": {}})])
        assert answer.body["code"] == "ModelNotFound"


def test_a_put_without_bytes_is_refused(daemon: Daemon, client: Client) -> None:
    with unharmed(client), raw_socket(daemon) as ask:
        session = ask([HEAD, packed(type="hello", body={"client": "t", "pid": 1, "version": "0"})]).body["session"]
        bare = {**TENSOR, "digest": bytes(32), "bytes": False}
        answer = ask([HEAD, packed(type="put", session=session, tensors=[bare], body={"tensors": [REF]})])
        assert answer.body["code"] == "ArgumentError"
