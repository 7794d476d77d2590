"""What tables of ComfyUI's networks say: which calls they are for, and which tokens each rank gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tacod.plan import Request
from tacod.rank.comfyui.check import small_inputs
from tacod.rank.comfyui.network import Network
from tacod.rank.comfyui.residuals import ResidualList
from tacod.rank.comfyui.split import Split
from tacod.rank.comfyui.tables import TABLES
from tacod.rank.comfyui.tables.base import Blocks, Cut, Mask, Table, Whole
from tacod.rank.comfyui.tables.calls import mismatch, shapes_of
from tacod.rank.comfyui.tokens import Misfit, Tokens
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.run import plan_for
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError
from tacod_client.tensors import to_wire

PROBE = {
    "x": (1, 4, 6, 6),
    "context": (1, 9, 8),
    "mask": Mask((1, 9)),
    "refs": [(1, 4, 2, 2)],
    "count": 9,
    "flag": True,
}
CALL: dict[str, Any] = {
    "x": torch.zeros(2, 4, 8, 10),
    "timestep": torch.zeros(2),
    "context": torch.zeros(2, 13, 8),
    "mask": torch.ones(2, 13),
    "refs": [torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 5, 3)],
    "count": 4,
    "flag": True,
}


def test_a_call_may_differ_in_sizes_and_numbers() -> None:
    assert mismatch(PROBE, {**CALL, "other": None, "map": {}, "list": []}).count == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"extra": torch.zeros(1)}, "that was checked without extra"),
        ({"extra": 0}, "that was checked without extra"),
        ({"mask": None}, "that was checked with mask"),
        ({"refs": []}, "that was checked with refs"),
        ({"context": torch.zeros(13, 8)}, "that was checked with other dimensions of context"),
        ({"context": [torch.zeros(2, 13, 8)]}, "that was checked with other dimensions of context"),
        ({"timestep": torch.zeros(2, 5)}, "that was checked with other dimensions of timestep"),
        ({"refs": [torch.zeros(2, 4, 3, 3), torch.zeros(4)]}, "that was checked with other dimensions of refs"),
        ({"flag": False}, "that was checked with other dimensions of flag"),
        ({"flag": "word"}, "that was checked with other dimensions of flag"),
        ({"count": torch.zeros(1)}, "that was checked with other dimensions of count"),
    ],
)
def test_a_call_that_differs_in_anything_else_is_told(changed: dict[str, Any], reason: str) -> None:
    found = mismatch(PROBE, {**CALL, **changed})
    assert found.count == 1
    assert found.reason == reason


def test_whole_numbers_of_a_small_forward() -> None:
    ids, grid = Whole(((3, 1, 2),)), Whole((((1, 4, 6),),))
    assert (ids.shape, grid.shape) == ((1, 3), (1, 1, 3))
    network = Network(Keeping(), torch.float32, "0")
    made = small_inputs(network, {"x": (1, 4), "ids": ids, "grid": grid}, torch.device("cpu"))
    assert torch.equal(made["ids"], torch.tensor([[3, 1, 2]]))
    assert torch.equal(made["grid"], torch.tensor([[[1, 4, 6]]]))
    assert mismatch({"x": (1, 4), "ids": ids, "grid": grid}, made).count == 0
    assert mismatch({"x": (1, 4), "ids": grid, "grid": grid}, made).reason.endswith("dimensions of ids")


def test_shapes_are_those_of_tensors_and_lists_of_tensors() -> None:
    shapes = shapes_of({**CALL, "words": ["a"]})
    assert shapes["refs"] == [(2, 4, 3, 3), (2, 4, 5, 3)]
    assert sorted(shapes) == ["context", "mask", "refs", "timestep", "x"]


def test_each_class_has_one_table() -> None:
    names = [table.network for table in TABLES]
    assert len(set(names)) == len(names)


class OneOf(SequenceParallel):
    """One of several ranks, as far as it needs no other."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.number, self.shares = rank, (1,) * ranks

    def place(self, n: int) -> tuple[int, int]:
        sizes = self.sizes(n)
        begin = sum(sizes[: self.number])
        return begin, begin + sizes[self.number]


def begun(
    value: Tensor, cut: Cut, rank: int, ranks: int, frame: int = 0, **others: Any
) -> tuple[Tokens, dict[str, Any]]:
    tokens, arguments = Tokens(OneOf(rank, ranks), frame), {"x": value, **others}
    tokens.begin(arguments, {"x": cut})
    return tokens, arguments


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("frame", [0, 1, 4, 6])
def test_each_rank_has_its_chunk_of_every_frame(frame: int, ranks: int) -> None:
    value, cut = torch.arange(24.0).reshape(1, 24, 1), Cut(1, ("video",))
    of_frames = []
    for rank in range(ranks):
        tokens, arguments = begun(value, cut, rank, ranks, frame)
        mine = tokens.cut(arguments["x"], cut, "x")
        assert mine.shape[1] == tokens.mine(tokens.runs.values())
        of_frames.append(mine.reshape(24 // frame if frame else 1, -1))
        # Tokens lie in their order, so the first ones of the whole are the first ones here.
        for count in range(30):
            assert tokens.count(count, "video", "n") == int((mine < count).sum())
    assert torch.equal(torch.cat(of_frames, dim=1).reshape(1, 24, 1), value)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_tokens_along_several_dimensions_and_at_the_end(ranks: int) -> None:
    value, cut = torch.randn(2, 3, 4, 7), Cut(0, ("video",), dims=3)
    added, tail = torch.randn(1, 20, 7), Cut(1, ("video",), tail=True)
    chunks, ends = [], []
    for rank in range(ranks):
        tokens, arguments = begun(value, cut, rank, ranks)
        chunks.append(tokens.cut(arguments["x"], cut, "x"))
        assert chunks[-1].shape[1:] == (1, 1, 7)
        assert chunks[-1].untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        ends.append(tokens.cut(added, tail, "added"))
        begin, end = tokens.sequence.place(24)
        assert ends[-1].shape[1] == end - begin - max(min(end, 4) - begin, 0)
    assert torch.equal(torch.cat(chunks).view(2, 3, 4, 7), value)
    assert torch.equal(torch.cat(ends, dim=1), added)


def test_tokens_that_do_not_count_are_left_out() -> None:
    value, cut = torch.randn(1, 13, 7), Cut(1, ("text",), crop="n")
    chunks = []
    for rank in range(3):
        tokens, arguments = begun(value, cut, rank, 3, n=10)
        chunks.append(tokens.cut(arguments["x"], cut, "x"))
        assert tokens.count(10, "text", "n") == chunks[-1].shape[1]
    assert torch.equal(torch.cat(chunks, dim=1), value[:, :10])


@pytest.mark.parametrize(("leading", "scarce"), [(4, ""), (0, "only 0 tokens of text"), (12, "only 0 tokens of image")])
def test_two_runs_in_one_tensor(leading: int, scarce: str) -> None:
    value, cut = torch.randn(1, 12, 7), Cut(1, ("text", "image"))
    chunks = []
    for rank in range(3):
        tokens = Tokens(OneOf(rank, 3), leading=leading)
        tokens.begin({"x": value}, {"x": cut})
        assert tokens.scarce == scarce
        chunks.append(tokens.cut(value, cut, "x"))
    parts = [
        torch.split(chunk, [len(range(leading)[rank::3]), chunk.shape[1] - len(range(leading)[rank::3])], dim=1)
        for rank, chunk in enumerate(chunks)
    ]
    assert torch.equal(torch.cat([each for both in zip(*parts, strict=True) for each in both], dim=1), value)


@pytest.mark.parametrize("lengths", [[20], [7, 13], [1, 2, 17], [0, 20]])
def test_lengths_of_images_that_lie_one_behind_the_other(lengths: list[int]) -> None:
    value, cut, given = torch.randn(20, 7), Cut(0, ("video",)), torch.tensor(lengths)
    found = []
    for rank in range(3):
        tokens, _ = begun(value, cut, rank, 3)
        mine = tokens.count(given, "video", "lengths")
        assert isinstance(mine, torch.Tensor)
        assert int(mine.sum()) == tokens.mine(tokens.runs.values())
        found.append(mine)
    assert torch.equal(torch.stack(found).sum(dim=0), given)
    for odd in (given.float(), given[:, None]):
        with pytest.raises(Misfit, match="no lengths of images"):
            tokens.count(odd, "video", "lengths")


def test_a_misfit_is_told() -> None:
    value, cut = torch.randn(1, 12, 7), Cut(1, ("text",))
    with pytest.raises(Misfit, match="no frames of 5"):
        begun(value, cut, 0, 2, frame=5)
    with pytest.raises(Misfit, match="the first run is no number of tokens"):
        Tokens(OneOf(0, 2), leading=-1).begin({"x": value}, {"x": Cut(1, ("text", "image"))})
    with pytest.raises(Misfit, match="n is no number of tokens"):
        begun(value, Cut(1, ("text",), crop="n"), 0, 2, n="4")
    tokens, _ = begun(value, cut, 0, 2)
    for odd in (torch.randn(1, 11, 7), torch.randn(12), "text", 3.0):
        with pytest.raises(Misfit, match="12 tokens were expected"):
            tokens.cut(odd, cut, "x")
    with pytest.raises(Misfit, match="unlike another argument"):
        tokens.begin({"y": value[:, 1:]}, {"y": cut})


class Step(nn.Module):
    """A block that can't compute on no tokens."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if not x.shape[1] or not y.shape[1]:
            raise ValueError("nothing to compute")
        return x + 1, y + 1


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((Step(), Step()))
        self.head = nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x, y = block(x, y)
        out: Tensor = self.head(x)
        return out


def test_with_fewer_tokens_than_ranks_each_rank_computes_all() -> None:
    """An error that some ranks meet and others don't costs all of them: the others wait in an exchange."""
    network = Steps()
    unused: Any = None
    table = Table(
        "made_up.Steps",
        (Blocks("blocks"),),
        {"x": Cut(1, ("image",)), "y": Cut(1, ("text",))},
        ("head", ("image",)),
        *[unused] * 4,
    )
    split = Split(network, table)
    x, y = torch.zeros(1, 9, 4), torch.zeros(1, 3, 4)
    for rank in range(4):
        with split.sharing(Tokens(OneOf(rank, 4)), {}):
            assert torch.equal(network(x, y), x + 2)
        assert split.unshared
    with split.sharing(Tokens(SequenceParallel()), {}):
        assert torch.equal(network(x, y), x + 2)
    assert not split.unshared


@pytest.mark.parametrize("window", [None, 3, 128])
def test_small_forwards_have_tokens_that_are_far_apart(window: int | None) -> None:
    """Where near tokens are all of them, a load would not notice a window of another size."""
    (table,) = (each for each in TABLES if each.network.endswith(".AceStepConditionGenerationModel"))
    layers = [SimpleNamespace(self_attn=SimpleNamespace(sliding_window=each)) for each in (None, window)]
    layer = SimpleNamespace(in_features=8)
    network = SimpleNamespace(
        decoder=SimpleNamespace(patch_size=2, layers=layers),
        tokenizer=SimpleNamespace(audio_acoustic_proj=layer),
        encoder=SimpleNamespace(text_projector=layer, lyric_encoder=SimpleNamespace(embed_tokens=layer)),
    )
    for probe in table.probes(network):
        assert probe["x"] == probe["refer_audio"]
        (tokens,) = table.lengths(network, probe)
        assert tokens > 2 * (window or 0) + 16


WAN = SimpleNamespace(patch_size=(1, 2, 2))
VIDEO, REFERENCE = (1, 16, 3, 10, 14), (1, 16, 1, 10, 14)


@pytest.mark.parametrize(
    ("network", "shapes", "fits"),
    [
        ("HumoWanModel", {"x": VIDEO, "audio_embed": (1, 3, 8, 5, 7), "reference_latent": REFERENCE}, True),
        ("HumoWanModel", {"x": VIDEO, "audio_embed": (1, 5, 8, 5, 7)}, False),
        ("HumoWanModel", {"x": VIDEO, "reference_latent": (1, 16, 1, 10, 12)}, False),
        ("HumoWanModel", {"x": (1, 16, 3, 9, 14), "reference_latent": (1, 16, 1, 9, 14)}, False),
        ("WanModel_S2V", {"x": VIDEO, "audio_embed": (1, 25, 7, 12)}, True),
        ("WanModel_S2V", {"x": VIDEO, "audio_embed": (1, 25, 7, 30)}, True),
        ("WanModel_S2V", {"x": VIDEO, "audio_embed": (1, 25, 7, 11)}, False),
        ("WanDancerModel", {"x": VIDEO}, True),
        ("WanDancerModel", {"x": VIDEO, "audio_embed": (1, 9, 35)}, False),
        ("WanDancerModel", {"x": (1, 16, 3, 8, 16), "audio_embed": (1, 9, 35)}, True),
    ],
)
def test_frames_that_the_network_would_confuse_are_not_split(network: str, shapes: dict[str, Any], fits: bool) -> None:
    (table,) = (each for each in TABLES if each.network.endswith(f".{network}"))
    assert (table.unfit(WAN, shapes) == "") is fits


@pytest.mark.parametrize("together", [False, True])
def test_images_that_a_network_looks_at_together_stay_on_one_rank(together: bool) -> None:
    network = Network(Keeping(), torch.float32, "0", together=together)
    values = {"x": torch.ones(2, 4), "timestep": torch.ones(2), "context": torch.ones(2, 5)}
    assert plan_for(network, Request(), 2, values).layout.ranks == (1 if together else 2)
    if together:
        with pytest.raises(ArgumentError, match="several images of a batch at once, so a batch stays together"):
            plan_for(network, Request(cfg_parallel=True), 2, values)


class Keeping(nn.Module):
    """A network that keeps what it has made of a context for later calls."""

    kept: Tensor | None = None

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **others: Any) -> Tensor:
        self.kept = context.mean() if self.kept is None else self.kept
        return x * self.kept

    def clear_kv_cache(self) -> None:
        self.kept = None


def test_a_call_does_not_see_what_a_network_kept_of_another() -> None:
    network = Network(Keeping(), torch.float32, "0")
    for factor in (2.0, 3.0):
        values = {"x": torch.ones(1, 4), "timestep": torch.ones(1), "context": torch.full((1, 5), factor)}
        out = network.run(SequenceParallel(), Inputs(values, network.specs_for(values)))
        assert isinstance(out, Tensor)
        assert torch.equal(out, torch.full((1, 4), factor))


def residuals(lengths: list[int | None], tokens: int, rank: int, ranks: int, whole: bool = False) -> ResidualList:
    """Those of a rank, each with numbers of its own."""
    made = [None if n is None else torch.arange(2.0 * n).reshape(1, n, 2) + i for i, n in enumerate(lengths)]
    control = Control({"input": [None if each is None else to_wire(each, "control") for each in made]})
    return ResidualList(control, "input", lambda: (OneOf(rank, ranks), tokens), whole, torch.device("cpu"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_adds_its_tokens_part_of_a_residual(ranks: int) -> None:
    lists = [residuals([7, None, 4], 7, rank, ranks) for rank in range(ranks)]
    assert [len(each) for each in lists] == [3] * ranks
    for place, length in ((0, 7), (2, 4)):
        parts = [each[place] for each in lists]
        assert torch.equal(
            torch.cat([part for part in parts if part is not None], dim=1),
            torch.arange(2.0 * length).reshape(1, length, 2) + place,
        )
    assert lists[0][1] is None
    last = [each.pop() for each in lists]
    assert [len(each) for each in lists] == [2] * ranks
    assert sum(part.shape[1] for part in last if part is not None) == 4


@pytest.mark.parametrize(("length", "whole"), [(8, False), (8, True), (6, True)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_residual_that_does_not_fit_is_refused_by_every_rank(length: int, whole: bool, rank: int) -> None:
    """Also by one whose own tokens it fits."""
    with pytest.raises(ArgumentError, match=rf"control.input\[0\]: it is for {length} tokens, but the image has 7"):
        residuals([length], 7, rank, 2, whole)[0]
