"""Several clients with a model or a LoRA each, and little room for them: all are answered, and right."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, START_S, Daemon, Tiny, eventually, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod_client import Client, Model, ModelNotFound, QueueFull

KEY = "double_blocks.0.img_attn.qkv.weight"
SHAPE = FLUX.model.state_dict()[KEY].shape
RANK = 500
LORA_BYTES = 4 * RANK * sum(SHAPE)
USERS = 4


def factors(user: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(user)
    rows, columns = SHAPE
    return 0.1 * torch.randn(rows, RANK, generator=drawn), 0.1 * torch.randn(RANK, columns, generator=drawn)


def lora(user: int) -> list[dict[str, Any]]:
    """As ComfyUI's nodes send it: a few hundred KB of tensors."""
    up, down = factors(user)
    return [{"key": KEY, "kind": "lora", "up": up, "down": down, "strength": 1.0}]


def from_file(models: Path, user: int) -> list[dict[str, Any]]:
    """The same from a file."""
    up, down = factors(user)
    module = "lora_unet_" + KEY.removesuffix(".weight").replace(".", "_")
    save_file({f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}, models / f"user{user}.safetensors")
    return [{"path": f"user{user}.safetensors", "strength": 1.0}]


Started = Callable[..., AbstractContextManager[Daemon]]


@pytest.fixture
def started(daemons: Callable[[int], Daemon]) -> Started:
    """The shared daemon with one rank, emptied, with other settings."""

    @contextmanager
    def started(**settings: Any) -> Iterator[Daemon]:
        daemon = daemons(1)
        daemon.empty()
        with daemon.changed({key.replace("__", "."): value for key, value in settings.items()}):
            yield daemon

    return started


def together(daemon: Daemon, work: Callable[[Client, int], Any], users: int = USERS) -> list[Any]:
    """What each user's work comes to; all of them at once."""

    def one(user: int) -> Any:
        with daemon.client() as client:
            return work(client, user)

    with ThreadPoolExecutor(users) as pool:
        return list(pool.map(one, range(users)))


def undisturbed(daemon: Daemon, patches: Sequence[Any]) -> list[Tensor]:
    with daemon.client() as client:
        return [client.load(FLUX.file, patches=each).forward(**FLUX.inputs()) for each in patches]


def sample(model: Model, steps: int = 12) -> Tensor:
    out: Tensor = FLUX.sample(model, steps).result()
    return out


@pytest.mark.parametrize("kind", ["tensors", "files"])
@pytest.mark.parametrize(
    "settings",
    [
        {"models__variants": 1},
        {"models__variants": 2, "limits__store_bytes": int(1.5 * LORA_BYTES)},
        {"models__variants": 1, "limits__store_bytes": int(1.2 * LORA_BYTES)},
        {"models__memory_bytes": sum(weight.nbytes for weight in FLUX.model.state_dict().values()) + 1},
    ],
    ids=["one variant", "cramped store", "one of each", "memory of one"],
)
def test_users_with_a_lora_each_take_turns(started: Started, models: Path, kind: str, settings: dict[str, Any]) -> None:
    patches = [lora(user) if kind == "tensors" else from_file(models, user) for user in range(USERS)]
    with started(**settings) as daemon:
        wanted = undisturbed(daemon, patches)
        assert all(relative_error(one, wanted[0]) > 1e-3 for one in wanted[1:])

        def work(client: Client, user: int) -> float:
            model = client.load(FLUX.file, patches=patches[user])
            return max(relative_error(model.forward(**FLUX.inputs()), wanted[user]) for _ in range(8))

        assert max(together(daemon, work)) <= FP32


def test_runs_whose_models_make_room_for_each_other_all_get_done(started: Started) -> None:
    """And go on where they were: each counts its steps once."""
    with started(models__variants=1) as daemon, daemon.client() as client:
        wanted = [sample(client.load(FLUX.file, patches=lora(user))) for user in range(3)]

        def work(client: Client, user: int) -> tuple[float, list[int]]:
            job = FLUX.sample(client.load(FLUX.file, patches=lora(user)), 12)
            steps = [progress.step for progress in job]
            return relative_error(job.result(), wanted[user]), steps

        for error, steps in together(daemon, work, 3):
            assert error <= FP32
            assert steps == sorted(set(steps)), "no step is done twice"


def test_whole_models_take_turns_too(started: Started, models: Path) -> None:
    tinies = [Tiny(f"turn{seed}", FLUX.config, seed) for seed in range(3)]
    for tiny in tinies:
        tiny.save(models)
    size = sum(weight.nbytes for weight in FLUX.model.state_dict().values())
    with started(models__memory_bytes=int(1.5 * size)) as daemon:

        def work(client: Client, user: int) -> None:
            model = client.load(tinies[user].file)
            for seed in range(5):
                tinies[user].check(model, seed)

        together(daemon, work, 3)
        with daemon.client() as client:
            assert len(client.models()) == 1


def test_a_model_that_made_room_is_loaded_for_a_turn_by_its_id(started: Started) -> None:
    """Also for a client that doesn't know what it was made of."""
    with started(models__variants=1) as daemon, daemon.client() as client:
        wanted = undisturbed(daemon, [lora(0)])[0]
        first = client.load(FLUX.file, patches=lora(0))
        found = client.model(first.id)
        client.load(FLUX.file, patches=lora(1))
        assert first.id not in [told["id"] for told in client.models()]
        assert relative_error(found.forward(**FLUX.inputs()), wanted) <= FP32


def test_a_lora_file_that_is_gone_is_told_at_the_turn(started: Started, models: Path) -> None:
    with started(models__variants=1) as daemon, daemon.client() as client:
        patches = from_file(models, 40)
        model = client.load(FLUX.file, patches=patches)
        client.load(FLUX.file, patches=lora(1))
        (models / "user40.safetensors").unlink()
        with pytest.raises(ModelNotFound, match="user40"):
            model.forward(**FLUX.inputs())
        FLUX.check(client.load(FLUX.file))


def back_after(client: Client, restarts: int) -> None:
    """Wait until the ranks are others."""
    eventually(lambda: client.status()["group"]["restarts"] > restarts, 10, "the loss is noticed")
    eventually(lambda: client.status()["state"] == "ready", START_S, "the ranks are back")


@pytest.mark.parametrize("users", [1, 2])
def test_a_lora_that_fits_the_store_alone_is_taken_however_many_came_before(started: Started, users: int) -> None:
    """What idle models hold in the store makes room; the models stay, and a lost rank costs no more than an upload."""
    with started(limits__store_bytes=int(1.5 * LORA_BYTES)) as daemon:
        wanted = undisturbed(daemon, [lora(user) for user in range(3)])
        with daemon.client() as one, daemon.client() as two:
            clients = (one, two)[:users]
            loaded = [clients[user % users].load(FLUX.file, patches=lora(user)) for user in range(3)]
            assert len(one.models()) == 4
            for attempt in range(2):
                for user in range(3):
                    error = relative_error(loaded[user].forward(**FLUX.inputs()), wanted[user])
                    assert error <= FP32, f"user {user}, {'after a lost rank' if attempt else 'at first'}"
                if attempt == 0:
                    restarts = one.status()["group"]["restarts"]
                    os.kill(daemon.rank_pids()[0], signal.SIGKILL)
                    back_after(one, restarts)
            assert one.stats()["store"]["bytes"] <= 1.5 * LORA_BYTES


def test_a_lora_larger_than_the_store_is_refused_before_it_is_sent(started: Started) -> None:
    with started(limits__store_bytes=int(0.8 * LORA_BYTES)) as daemon, daemon.client() as client:
        before = client.stats()["rx_bytes"]
        with pytest.raises(QueueFull, match="never fit"):
            client.load(FLUX.file, patches=lora(0))
        assert client.stats()["rx_bytes"] - before < 10_000
        FLUX.check(client.load(FLUX.file))


def test_who_fills_the_store_is_told_and_others_go_on(started: Started) -> None:
    """One client's runs hold half of the store at the most, so another one's conditioning finds room."""
    context = 4 * 8 * 129
    with started(limits__store_bytes=int(4.5 * context)) as daemon, daemon.client() as one:
        runs = [FLUX.sample(one.load(FLUX.file), 20000, seed) for seed in (1, 2)]
        with pytest.raises(QueueFull, match="may need half"):
            FLUX.sample(one.load(FLUX.file), 20000, 3)
        with daemon.client() as two:
            for seed in (4, 5, 6):
                FLUX.check(two.load(FLUX.file), seed)
        for run in runs:
            run.cancel()
        eventually(lambda: not one.jobs(), 10, "the runs are cancelled")
        FLUX.check(one.load(FLUX.file), 3)
