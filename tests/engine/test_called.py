"""Weights that are fetched for networks that call their blocks themselves: the bits are those of whole weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tacod.rank.comfyui.network import Network
from tacod.rank.comfyui.units import find_units, sizes_of_units
from tacod.rank.comm.group import Group
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.trunk import BlockWatch
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.called import Called, hook_units
from tacod.rank.weights.load import get_weight, set_weight, share
from tacod.rank.weights.stage import OnCPU, Stage
from tacod.rank.weights.streaming import Streaming
from tacod_client.errors import Cancelled

DIM, BLOCKS = 16, 9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.scale = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.norm(self.linear(x)) * self.scale).tanh()


class Table(nn.Module):
    """Gives its weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self) -> Tensor:
        return self.rows[:4]


class Net(nn.Module):
    """Runs its blocks as ``way`` says."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.table = Table()
        self.nested = Nested([*self.blocks[:5]])
        self.way = way

    def forward(
        self, x: Tensor, timestep: Tensor, context: Any = None, control: Any = None, transformer_options: Any = None
    ) -> Tensor:
        return self.way(self, x)

    def preprocess_text_embeds(self, x: Tensor) -> Tensor:
        return through(self.blocks, x)


def through(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def directly(net: Net, x: Tensor) -> Tensor:
    """Weights are used without their modules, one of them while another block is in place."""
    block, last = net.blocks[3], net.blocks[-1]
    x = torch.nn.functional.linear(through(net.blocks[:3], x), block.linear.weight, block.linear.bias)
    return x @ last.linear.weight.t()[:, :DIM] + last.scale.sum() + block.norm.weight


def given_away(net: Net, x: Tensor) -> Tensor:
    """A module gives its weights, and they are used when others are in its place."""
    rows = net.table()
    return through(net.blocks, x) + rows.sum(dim=0)


def kept_for_later(net: Net, x: Tensor) -> Tensor:
    """A weight is taken behind its module's call, and used when others are in place."""
    x = net.blocks[0](x)
    scale, weight = net.blocks[0].scale, net.blocks[0].linear.weight
    return torch.nn.functional.linear(through(net.blocks[1:], x), weight) * scale


class Nested(nn.Module):
    """Calls blocks that aren't its own, and uses its weight before and behind them."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM))
        self.others = (*blocks,)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return torch.nn.functional.linear(through(self.others, x @ self.weight), weight)


def nested(net: Net, x: Tensor) -> Tensor:
    return net.nested(x) + net.blocks[2](x)


def caught(net: Net, x: Tensor) -> Tensor:
    """A call fails, and the network goes on."""
    with contextlib.suppress(RuntimeError):
        net.blocks[4](x[..., :3])
    return through(net.blocks, x) @ net.blocks[4].linear.weight


def other_order_each_time(net: Net, x: Tensor) -> Tensor:
    """Buffers are filled anew in any case."""
    order = [i for i in range(BLOCKS) if i % 2 == int(x[0, 0, 0] > 0)]
    return through([net.blocks[i] for i in (*order, *reversed(order))], x)


WAYS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "in order": lambda net, x: through(net.blocks, x),
    "backwards": lambda net, x: through(reversed(net.blocks), x),
    "twice": lambda net, x: through([block for block in net.blocks for _ in range(2)], x),
    "to and fro": lambda net, x: through([net.blocks[i] for i in (0, 5, 0, 5, 2, 4, 2)], x),
    "some": lambda net, x: through(net.blocks[::2], x),
    "by parts": lambda net, x: net.blocks[2].norm(net.blocks[1].linear(x)),
    "directly": directly,
    "given away": given_away,
    "kept for later": kept_for_later,
    "nested": nested,
    "caught": caught,
    "another order each time": other_order_each_time,
}


def inputs(seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, DIM, generator=generator)
    values = {"x": x, "timestep": torch.ones(2)}
    return Inputs(values, Network(Net(WAYS["in order"]), torch.float32, "").specs_for(values))


def fetched(net: Net, weights: str = "host") -> tuple[Network, Streaming]:
    """A network of which this rank fetches every unit."""
    network = Network(net, torch.float32, "", None, find_units(net))
    with Streaming(Group(), torch.device("cpu"), weights, [None], False, smallest=0) as streaming:
        streaming.begin(network, sizes_of_units(net, network.blocks_at, smallest=0))
        for turn in streaming.turns(["", *network.blocks_at]):
            streaming.store(network, turn)
        streaming.finish(network)
    hook_units(network, network.blocks_at)
    return network, streaming


def whole(way: str) -> Net:
    torch.manual_seed(0)
    return Net(WAYS[way]).requires_grad_(False)


@pytest.mark.parametrize("way", WAYS)
def test_any_way_of_using_weights_gives_the_same_bits(way: str) -> None:
    plain, (network, _) = Network(whole(way), torch.float32, ""), fetched(whole(way))
    assert isinstance(network.weights, Stage)
    assert len(network.weights.staged) == BLOCKS + 2
    with torch.inference_mode():
        for seed in (1, 2, 1, 3):
            wanted = plain.run(SequenceParallel(), inputs(seed))
            assert torch.equal(network.run(SequenceParallel(), inputs(seed)), wanted)  # type: ignore[arg-type]


def test_a_patched_network_and_its_base_take_turns() -> None:
    key = "blocks.4.linear.weight"
    plain, (network, streaming) = Network(whole("in order"), torch.float32, ""), fetched(whole("in order"))
    other, patched = share(plain), share(network)
    with torch.inference_mode(), streaming:
        set_weight(other, key, 2 * get_weight(plain, key))
        for keys in streaming.in_turn(network, patched, [key]):
            for each in keys:
                set_weight(patched, each, 2 * get_weight(network, each))
        outs = [each.run(SequenceParallel(), inputs(1)) for each in (network, patched, network, patched)]
        wanted = [each.run(SequenceParallel(), inputs(1)) for each in (plain, other)] * 2
    assert all(map(torch.equal, outs, wanted))
    assert not torch.equal(*wanted[:2])  # type: ignore[call-arg]


def test_the_next_unit_is_on_its_way_before_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its order is known: each unit is fetched once, while the one before it has its weights in place."""
    network, _ = fetched(whole("backwards"))
    told: list[Any] = []
    fetch, enter = OnCPU.fetch, Called.enter

    def fetching(self: OnCPU, number: int, copies: Any) -> None:
        told.append(number)
        fetch(self, number, copies)

    def entering(self: Called, path: str) -> None:
        if not self._calls:
            told.append(path)
        enter(self, path)

    monkeypatch.setattr(OnCPU, "fetch", fetching)
    monkeypatch.setattr(Called, "enter", entering)
    with torch.inference_mode():
        for _ in range(2):
            told.clear()
            network.run(SequenceParallel(), inputs(1))
    blocks = [f"blocks.{i}" for i in reversed(range(BLOCKS))]
    numbers = [i % 2 for i in reversed(range(BLOCKS))]
    assert (
        told == [numbers[0], *(each for pair in zip(blocks, [*numbers[1:], None], strict=True) for each in pair)][:-1]
    )


def test_a_forward_that_breaks_off_leaves_no_weights_away() -> None:
    fails = [False]

    def way(net: Net, x: Tensor) -> Tensor:
        x = through(net.blocks[:4], x)
        if fails[0]:
            raise ValueError("angry")
        return through(net.blocks[4:], x)

    WAYS["breaking off"] = way
    network, _ = fetched(whole("breaking off"))
    with torch.inference_mode():
        wanted = network.run(SequenceParallel(), inputs(1))
        fails[0] = True
        with pytest.raises(ValueError, match="angry"):
            network.run(SequenceParallel(), inputs(1))
        fails[0] = False
        assert all(type(each) is nn.Parameter for each in network.parameters())
        assert torch.equal(network.run(SequenceParallel(), inputs(1)), wanted)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_a_stop_before_a_block_ends_its_call_too() -> None:
    """The hook that counts blocks raises, and what always runs behind a call has nothing to add to that."""

    class Stop(BlockWatch):
        def before(self, block: int, blocks: int) -> None:
            if block == 3:
                raise Cancelled("stopped")

    network, _ = fetched(whole("in order"))
    with torch.inference_mode():
        wanted = network.run(SequenceParallel(), inputs(1))
        with pytest.raises(Cancelled):
            network.run(SequenceParallel(), inputs(1), watch=Stop())
        assert torch.equal(network.run(SequenceParallel(), inputs(1)), wanted)  # type: ignore[arg-type]


def test_a_method_outside_of_a_forward_has_the_weights_too() -> None:
    network, _ = fetched(whole("in order"))
    x = inputs(1)["x"]
    with torch.inference_mode():
        network.run(SequenceParallel(), inputs(2))
        out = network.methods()["preprocess_text_embeds"].run(x)
        assert isinstance(out, Tensor)
        assert torch.equal(out, through(whole("in order").blocks, x))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (lambda net, x: x + net.blocks[3].scale.add_(1), "these are read only"),
        (lambda net, x: x + net.blocks[3].scale.data_ptr(), "a kernel asks where a weight lies"),
    ],
)
def test_what_absent_weights_refuse(way: Any, words: str) -> None:
    torch.manual_seed(0)
    network, _ = fetched(Net(way))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=words):
        network.run(SequenceParallel(), inputs(1))


@pytest.mark.parametrize("blocks", [2, 9, 40])
def test_units_are_small_parts_and_have_most_weights(blocks: int) -> None:
    net = whole("in order")
    net.blocks = nn.ModuleList(Block() for _ in range(blocks))
    net.wide = nn.Linear(DIM, 5 * DIM)
    net.again = nn.ModuleList([net.blocks[0]])
    units = find_units(net)
    sizes = sizes_of_units(net, units, smallest=0)
    assert sizes.total == sum(each.nbytes for each in net.parameters())
    assert sizes.least < 0.9 * sizes.total
    # Buffers for it would take more than it does.
    assert "wide" not in units
    assert sizes.others < 0.1 * sizes.total + net.wide.weight.nbytes + net.wide.bias.nbytes
    modules = [module for path in units for module in net.get_submodule(path).modules()]
    assert len(modules) == len(set(modules))
    assert ("blocks.1" in units) == (blocks > 8)
