"""Networks of the user's ComfyUI in the ranks: split by a table that each load checks, or image by image."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, OFTEN, Daemon, relative_error
from made_up_networks import COMFYUI, WAVES, Calls, changed, expected, image, inputs, save, weights

from tacod.tools.plan import main as plan
from tacod_client import ArgumentError, Client, EngineError, Model, ModelUnsupported, OutOfMemory

KINDS = ("aura", "waves")
LORA = torch.ones(WAVES["dim"], 2), torch.arange(2.0 * WAVES["channels"]).reshape(2, WAVES["channels"])
LORA_STRENGTH = 0.5
ADDED_TO = "double_layers.1.image.weight"
ADDED = torch.randn(80, 80, generator=torch.Generator().manual_seed(5)) / 7
Networks = Callable[[int], Daemon]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    for kind in KINDS:
        save(kind, folder)
    return folder


@pytest.fixture(scope="module")
def networks(files: Path) -> Iterator[Networks]:
    """The daemon with so many ranks, and the made-up ComfyUI."""
    started: dict[int, Daemon] = {}

    def get(ranks: int) -> Daemon:
        if ranks not in started:
            settings = {"comfyui.path": str(COMFYUI), "group.step_timeout_s": 3.0, "group.retries": 1, **OFTEN}
            started[ranks] = Daemon(ranks, [files], settings).__enter__()
        return started[ranks]

    yield get
    for daemon in started.values():
        daemon.__exit__(None, None, None)


@pytest.fixture
def client(networks: Networks) -> Iterator[Client]:
    with networks(2).client() as client:
        yield client


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """What each network itself gives for three images, one by one; and patched, for one."""
    calls = {kind: Calls(kind, [image(inputs(kind, 3), index) for index in range(3)]) for kind in KINDS}
    matrix = weights("waves")["embed.weight"] + LORA_STRENGTH * torch.matmul(*LORA)
    calls["waves, patched"] = Calls("waves", [inputs("waves", 1)], {"embed.weight": matrix})
    calls["aura, patched"] = Calls("aura", [inputs("aura", 1)], {ADDED_TO: weights("aura")[ADDED_TO] + ADDED})
    return expected(calls, tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_table_shares_out_the_tokens_of_an_image(networks: Networks, outs: Any, ranks: int) -> None:
    with networks(ranks).client() as client:
        model = client.load("aura.safetensors")
        assert model.family == "comfyui"
        assert model.network.startswith("ComfyUI 0.0.1 (")
        assert model.network.endswith("): MMDiT")
        for images in (1, 3):
            out = model.forward(**inputs("aura", images))
            assert relative_error(out, torch.cat(outs["aura"][:images])) <= FP32
            assert model.stats.last is not None
            assert model.stats.last.ranks == ranks
            if images == 1 and ranks > 1:
                assert f"sequence {ranks} (ulysses; 5 heads over {ranks} ranks" in model.stats.last.plan
        if ranks > 1:
            ring = client.load("aura.safetensors", plan={"ring": ranks})
            assert relative_error(ring.forward(**inputs("aura", 1)), outs["aura"][0]) <= FP32
            assert ring.stats.last is not None
            assert "ring" in ring.stats.last.plan
        else:
            assert torch.equal(model.forward(**inputs("aura", 1)), outs["aura"][0])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_without_a_table_ranks_share_the_images(networks: Networks, outs: Any, ranks: int) -> None:
    """To the bit, if each has one."""
    with networks(ranks).client() as client:
        model = client.load("waves.safetensors")
        assert not model.shares_tokens
        assert model.plan.startswith("sequence 1")
        assert "Waves; tokens are not shared out: this version has no table" in model.network
        out = model.forward(**inputs("waves", ranks))
        assert torch.equal(out, torch.cat(outs["waves"][:ranks]))
        assert model.stats.last is not None
        assert model.stats.last.ranks == ranks
        one = model.forward(**inputs("waves", 1))
        assert torch.equal(one, outs["waves"][0])
        assert model.stats.last.plan.startswith("sequence 1")


def test_a_text_of_fewer_tokens_than_ranks_is_told_of(client: Client) -> None:
    """Each rank computes all tokens then, and so the same as one alone."""
    model, given = client.load("aura.safetensors"), inputs("aura", 1)
    given["context"] = given["context"][:, :1]
    out = model.forward(**given)
    assert model.stats.last is not None
    assert model.stats.last.plan == "sequence 1 on each rank, not sequence 2: only 1 tokens of text"
    alone = client.load("aura.safetensors", plan={"sequence_parallel_degree": 1})
    assert torch.equal(alone.forward(**given), out)
    assert alone.stats.last is not None
    assert alone.stats.last.plan.startswith("sequence 1 (")


def test_arguments_without_a_check_keep_an_image_on_one_rank(client: Client) -> None:
    model = client.load("aura.safetensors")
    plain = model.forward(**inputs("aura", 1))
    out = model.forward(**inputs("aura", 1), unheard_of=3)
    assert relative_error(out, plain) <= FP32
    assert model.stats.last is not None
    assert model.stats.last.ranks == 1


@pytest.mark.parametrize("name", ["wave_in.weight", "embed.weight"])
def test_patches_apply_by_the_names_of_file_and_network(client: Client, outs: Any, name: str) -> None:
    up, down = LORA
    base = client.load("waves.safetensors")
    before = base.forward(**inputs("waves", 1))
    patch = {"kind": "lora", "key": name, "strength": LORA_STRENGTH, "up": up, "down": down}
    patched = client.load("waves.safetensors", patches=[patch])
    assert relative_error(patched.forward(**inputs("waves", 1)), outs["waves, patched"][0]) <= FP32
    assert torch.equal(base.forward(**inputs("waves", 1)), before)


def test_a_patched_model_is_split_too(client: Client, outs: Any) -> None:
    patched = client.load("aura.safetensors", patches=[{"kind": "diff", "key": ADDED_TO, "diff": ADDED}])
    assert relative_error(patched.forward(**inputs("aura", 1)), outs["aura, patched"][0]) <= FP32
    assert patched.stats.last is not None
    assert patched.stats.last.ranks == 2


# --- weights that aren't whole on each rank ---------------------------------------------------------------------------


def described(client: Client, model: str) -> dict[str, Any]:
    return next(each for each in client.status()["models"] if each["id"] == model)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("where", ["sharded", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_ranks_fetch_give_the_same_bits(networks: Networks, kind: str, where: Any, ranks: int) -> None:
    """With a table and without, whole images on each rank and shared ones."""
    with networks(ranks).client() as client:
        whole, apart = (client.load(f"{kind}.safetensors", weights=weights) for weights in ("replicated", where))
        assert apart.network == whole.network
        for images in (1, 2, 1):
            assert apart.forward(**inputs(kind, images)).equal(whole.forward(**inputs(kind, images)))
        told, other = described(client, apart.id), described(client, whole.id)
        assert (other["weights"], other["streamed_bytes"]) == ("replicated", [0] * ranks)
        assert told["weights"] == (where if ranks > 1 or where == "host" else "replicated")
        if told["weights"] != "replicated":
            assert min(told["streamed_bytes"]) > 0
        client.unload(apart.id)


@pytest.mark.parametrize("where", ["sharded", "host"])
def test_patches_of_weights_that_ranks_fetch(client: Client, where: Any) -> None:
    name = "double_layers.1.attn.qkv.weight"
    added = torch.randn(240, 80, generator=torch.Generator().manual_seed(5)) / 9
    patches = [{"kind": "diff", "key": name, "diff": added}]
    base, given = client.load("aura.safetensors", weights=where), inputs("aura", 1)
    before = base.forward(**given)
    whole, apart = (client.load("aura.safetensors", patches=patches, weights=each) for each in ("replicated", where))
    assert apart.forward(**given).equal(whole.forward(**given))
    assert base.forward(**given).equal(before)
    assert not apart.forward(**given).equal(before)
    assert described(client, apart.id)["weight_bytes"] <= added.nbytes


def test_a_budget_is_filled_and_models_take_turns(files: Path, outs: Any) -> None:
    """Of the 460 kB of one network, and no room for two."""
    budget = 300_000
    settings = {"comfyui.path": str(COMFYUI), "models.memory_bytes": budget}
    with Daemon(2, [files], settings) as daemon, daemon.client() as client:
        model = client.load("aura.safetensors")
        told = described(client, model.id)
        assert told["weights"] in ("sharded", "host")
        assert max(told["resident_bytes"]) <= budget
        assert min(told["streamed_bytes"]) > 0
        other = client.load("aura.safetensors", dtype="bf16")
        assert [each["id"] for each in client.models()] == [other.id]
        assert relative_error(model.forward(**inputs("aura", 1)), outs["aura"][0]) <= FP32


def test_a_network_that_no_budget_holds_says_how_much_would(files: Path) -> None:
    settings = {"comfyui.path": str(COMFYUI), "models.memory_bytes": 1000}
    with Daemon(1, [files], settings) as daemon, daemon.client() as client:
        with pytest.raises(OutOfMemory, match=r"at least .* on each device .* raise models\.memory_bytes"):
            client.load("aura.safetensors")
        assert client.models() == []


def test_a_plan_says_how_much_each_rank_would_hold(files: Path) -> None:
    """In a process of its own, for it imports the ComfyUI."""
    options = ["--ranks", "2", "--memory", "0.0002", "--json", "--comfyui", str(COMFYUI)]
    command = [sys.executable, "-m", "tacod.tools.plan", *options, str(files / "aura.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert (report["family"], report["network"]) == ("comfyui", "MMDiT")
    assert report["weights"] in ("sharded", "host")
    assert max(report["resident_bytes"]) <= 0.0002 * 2**30 < report["weight_bytes"]
    assert min(report["streamed_bytes"]) > 0


def test_a_plan_refuses_shares_that_no_network_takes(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ranks", "2", "--shares", "2,1", "--comfyui", str(COMFYUI)]
    assert plan([*options, str(files / "aura.safetensors")]) != 0
    assert "--shares: ranks take equal shares of ComfyUI's networks; leave it out" in capsys.readouterr().err


def test_a_comfyui_that_looks_at_numbers_is_given_them(files: Path, tmp_path: Path, outs: Any) -> None:
    """Where shapes alone don't do, ComfyUI gets the whole file."""
    looks = """        assert all(float(each.float().abs().sum()) > 0 for each in state_dict.values())
        found = {}
"""
    folder = changed(tmp_path, "comfy/supported_models.py", "        found = {}\n", looks)
    with Daemon(2, [files], {"comfyui.path": str(folder)}) as daemon, daemon.client() as client:
        model = client.load("aura.safetensors", weights="host")
        assert "ComfyUI is given all weights at once" in daemon.log
        assert min(described(client, model.id)["streamed_bytes"]) > 0
        assert relative_error(model.forward(**inputs("aura", 1)), outs["aura"][0]) <= FP32


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_without_a_comfyui_its_files_are_refused(client: Client, files: Path, models: Path, daemon: Daemon) -> None:
    (models / "waves.safetensors").write_bytes((files / "waves.safetensors").read_bytes())
    with daemon.client() as other, pytest.raises(ModelUnsupported, match="no family knows this file"):
        other.load("waves.safetensors")


@pytest.mark.parametrize(
    ("changes", "plan", "words"),
    [
        ({"x": torch.tensor(3.0)}, "auto", "x: expected a tensor or a list of tensors"),
        ({"x": [torch.ones(2, 3), torch.ones(1, 3)]}, "auto", "x: its tensors are for no one number of images"),
        ({"control": {"tensors": []}}, "auto", "control: .* Waves takes no ControlNet's residuals"),
        ({"lyrics": [[[[[[[[[0]]]]]]]]]}, "auto", "more than 8 deep"),
        ({}, {"step_cache": 0.1}, "plan: step_cache is for this version's own families"),
        ({}, {"flash_attention": False}, "plan: Waves is ComfyUI's, which chooses its own attention"),
        ({}, {"ulysses": 2}, "plan: the tokens of ComfyUI's Waves aren't shared out: this version has no table"),
        ({"transformer_options": {"cond_or_uncond": [0, 1]}}, {"cfg_parallel": True}, "so a batch stays together"),
    ],
)
def test_calls_that_it_does_not_have(client: Client, changes: dict[str, Any], plan: Any, words: str) -> None:
    model = client.load("waves.safetensors", plan=plan)
    with pytest.raises(ArgumentError, match=words):
        model.forward(**{**inputs("waves", 2), **changes})


def test_a_plan_may_ask_for_what_is_so_anyway(client: Client, outs: Any) -> None:
    model = client.load("waves.safetensors", plan={"attention": "exact", "step_cache": 0})
    assert torch.equal(model.forward(**inputs("waves", 1)), outs["waves"][0])


def test_dtypes_that_it_does_not_have(client: Client) -> None:
    with pytest.raises(ArgumentError, match="dtype: bf16_weight_only is for this version's own families"):
        client.load("waves.safetensors", dtype="bf16_weight_only")


def test_it_has_no_sampling(client: Client) -> None:
    model = client.load("waves.safetensors")
    noise = inputs("waves", 1)["x"]
    with pytest.raises(ArgumentError, match="which sample doesn't give; call forward for each step"):
        model.sample(noise=noise, latent=noise, sigmas=torch.tensor([1.0, 0.0]), positive={}).result()


def test_a_batch_of_which_the_network_reads_the_conditions_stays_together(client: Client, outs: Any) -> None:
    model, given = client.load("waves.safetensors"), inputs("waves", 2)
    options = {**given["transformer_options"], "cond_or_uncond": [0, 1]}
    out = model.forward(**{**given, "transformer_options": options})
    assert relative_error(out, torch.cat(outs["waves"][:2])) <= FP32
    assert model.stats.last is not None
    assert model.stats.last.ranks == 1


# --- a ComfyUI that is not as it was ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        # Attention that nobody can exchange: each rank would attend to its own tokens.
        (
            "self.attn(cx * global_cond[:, None], transformer_options=transformer_options)",
            "self.attn(cx * global_cond[:, None])",
            r"with sequence 2 \(ulysses\) a small forward differed by \d",
        ),
        # Something between tokens that isn't attention.
        ("x + self.image(image).sin()", "x + self.image(image).sin().cumsum(1)", "a small forward differed by"),
        ("def forward(self, c: Tensor, x: Tensor,", "def forward(self, c: Tensor, y: Tensor,", "take no x"),
        ("return c + self.text(text).sin(), x +", "return torch.cat((c, c), 1), x +", "a small forward failed"),
    ],
)
def test_a_changed_network_is_found_out_and_runs_whole(
    files: Path, tmp_path: Path, before: str, after: str, reason: str
) -> None:
    """What it gives is right all the same: that of its own code on one rank."""
    if "y: Tensor" in after:
        folder = changed(tmp_path, "comfy/ldm/aura/mmdit.py", before, after)
        path = folder / "comfy/ldm/aura/mmdit.py"
        text = path.read_text()
        begin = text.index(after)
        end = text.index("class Single")
        path.write_text(
            text[:begin]
            + text[begin:end].replace("(c, x)", "(c, y)").replace("x.shape", "y.shape").replace(", x +", ", y +")
            + text[end:]
        )
    else:
        folder = changed(tmp_path, "comfy/ldm/aura/mmdit.py", before, after)
    with Daemon(2, [files], {"comfyui.path": str(folder)}) as daemon, daemon.client() as client:
        model = client.load("aura.safetensors")
        assert "MMDiT; tokens are not shared out: " in model.network
        assert re.search(reason, model.network)
        assert "ComfyUI's MMDiT runs on one rank for each image" in daemon.log
        out = model.forward(**inputs("aura", 1))
        assert out.isfinite().all()
        assert model.stats.last is not None
        assert model.stats.last.ranks == 1


def test_an_error_of_one_rank_alone_costs_a_load_no_time(files: Path, tmp_path: Path) -> None:
    """The others would wait for it in an exchange, and all ranks end when a load takes too long."""
    before = "        return c + self.text(text)"
    # Of the nine tokens of the small forward's text the second rank has four.
    after = f"        if c.shape[1] == 4:\n            raise ValueError('this rank is angry')\n{before}"
    folder = changed(tmp_path, "comfy/ldm/aura/mmdit.py", before, after)
    with Daemon(2, [files], {"comfyui.path": str(folder)}) as daemon, daemon.client() as client:
        pids = daemon.rank_pids()
        model = client.load("aura.safetensors")
        reason = r"with sequence 2 \(ulysses\) a small forward failed \(ValueError: this rank is angry\)"
        assert re.search(reason, model.network)
        for _ in range(2):
            assert model.forward(**inputs("aura", 1)).isfinite().all()
        assert model.stats.last is not None
        assert model.stats.last.ranks == 1
        assert daemon.rank_pids() == pids


@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        ("requirements.txt", "einops", "comfy-kitchen==99.1", r"need comfy-kitchen==99\.1: run `.*pip install"),
        (
            "comfy/model_detection.py",
            "_LISTS = (",
            "_LISTS = ((",
            "can't be imported: comfy.model_detection: SyntaxError",
        ),
        ("comfy/model_detection.py", 'if "wave_in.weight" in', 'if "gone" in', "doesn't know it either"),
        ("comfy/supported_models.py", "**self.unet_config", "", "can't make its network: TypeError"),
        (
            "comfy/ldm/waves/model.py",
            "        self.out =",
            "        self.more = Linear(2, 2)\n        self.out =",
            "lacks more",
        ),
    ],
)
def test_what_cannot_be_loaded_is_said(
    files: Path, tmp_path: Path, file: str, before: str, after: str, words: str
) -> None:
    folder = changed(tmp_path, file, before, after)
    with Daemon(1, [files], {"comfyui.path": str(folder)}) as daemon, daemon.client() as client:
        pids = daemon.rank_pids()
        with pytest.raises(Exception, match=words):
            client.load("waves.safetensors")
        assert daemon.rank_pids() == pids


# --- networks that misbehave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mood", "error", "stay"),
    [
        ("exit", EngineError, False),
        ("hang", EngineError, False),
        ("hungry", OutOfMemory, True),
        ("angry", EngineError, True),
    ],
)
def test_it_ends_its_ranks_and_not_the_daemon(
    networks: Networks, outs: Any, mood: str, error: type[Exception], stay: bool
) -> None:
    daemon = networks(2)
    with daemon.client() as client:
        model = client.load("waves.safetensors")
        pid, pids = daemon.pid, daemon.rank_pids()
        with pytest.raises(error):
            # An image for each rank, so that both meet the same.
            model.forward(**inputs("waves", 2), mood=mood)
        assert (daemon.rank_pids() == pids) == stay
        assert torch.equal(model.forward(**inputs("waves", 1)), outs["waves"][0])
        assert daemon.pid == pid


@pytest.mark.parametrize("images", [1, 2])
def test_an_error_of_its_own_is_told_to_ranks_that_have_no_image(networks: Networks, outs: Any, images: int) -> None:
    """Otherwise ranks would disagree, and end: such as for arguments that don't fit."""
    daemon = networks(3)
    with daemon.client() as client:
        model, pids = client.load("waves.safetensors"), daemon.rank_pids()
        with pytest.raises(EngineError, match="ComfyUI's own network Waves failed: "):
            model.forward(**inputs("waves", images), mood="angry")
        assert daemon.rank_pids() == pids
        assert torch.equal(model.forward(**inputs("waves", 1)), outs["waves"][0])


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(1, 4, 6)},
        {"x": [torch.ones(1, 4, 6, 10)] * 2},
        {"context": torch.ones(1, 7)},
        {"context": [torch.ones(1, 7, 8)]},
    ],
    ids=["x without a side", "a list", "context without channels", "a list as context"],
)
def test_what_a_table_was_not_checked_with_is_for_the_network_to_refuse(
    networks: Networks, outs: Any, changes: dict[str, Any]
) -> None:
    daemon = networks(2)
    with daemon.client() as client:
        model, pids = client.load("aura.safetensors"), daemon.rank_pids()
        with pytest.raises(EngineError, match=r"ComfyUI's own network .* failed: "):
            model.forward(**{**inputs("aura", 1), **changes})
        assert daemon.rank_pids() == pids
        assert relative_error(model.forward(**inputs("aura", 1)), outs["aura"][0]) <= FP32
        with pytest.raises(ArgumentError, match="that was checked with other dimensions of "):
            client.load("aura.safetensors", plan={"ulysses": 2}).forward(**{**inputs("aura", 1), **changes})


def test_only_what_networks_need_is_imported(networks: Networks, client: Client) -> None:
    client.load("waves.safetensors")
    log = networks(2).log
    assert "TOTAL VRAM" not in log
    assert f"networks come from the ComfyUI at {COMFYUI}, version 0.0.1" in log
    server = networks(2).fork_server()
    assert server is not None
    assert not any("made_up_comfyui" in each.path for each in server.memory_maps())


def test_the_model_tells_of_its_network(client: Client) -> None:
    model: Model = client.load("waves.safetensors")
    (listed,) = [each for each in client.status()["models"] if each["id"] == model.id]
    assert listed["network"] == model.network
    assert json.loads(json.dumps(listed["sampling"])) == {}
