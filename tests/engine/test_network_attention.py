"""Every way in which ComfyUI's networks call attention: exchanged, or refused with the image on one rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import FP32, relative_error
from made_up_attention import HEADS, HOW, REFUSED, TEXT, WIDTH, attention, inputs, network
from rank_worker import WORLD, Ranks
from test_network_tables import OneOf

from tacod.plan import Request
from tacod.rank.comfyui.attention import attend, attend_near
from tacod.rank.comfyui.tables.base import Cut, LinearAttention
from tacod.rank.comfyui.tokens import Misfit, Tokens
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.run import plan_for
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError

LAYOUTS = [(1, 3, 1), (1, 1, 2), (1, 2, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("how", [each for each in HOW if each not in REFUSED])
def test_it_gives_what_all_tokens_give(ranks: Ranks, how: str, layout: tuple[int, ...]) -> None:
    for error, reason, told in ranks.run(layout, "called", how=how, text=TEXT, dtype="float32")[
        : layout[1] * layout[2]
    ]:
        assert (error <= FP32, reason) == (True, "")
        assert told.startswith(f"sequence {layout[1] * layout[2]} (")


def test_attention_in_fp32_is_in_fp32() -> None:
    """Its result is rounded to bf16 once, at its end."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, 9, WIDTH, generator=g).bfloat16() for _ in range(3))
    tokens = Tokens(SequenceParallel())
    tokens.begin({"x": q}, {"x": Cut(1, ("all",))})
    whole, rounded = (
        attend(tokens, [*tokens.runs.values()], False, q, k, v, HEADS, attn_precision=precision)
        for precision in (torch.float32, None)
    )
    exact = attention(q.float(), k.float(), v.float(), HEADS).bfloat16()
    assert relative_error(whole, exact) <= 2e-4 < relative_error(rounded, exact)


def test_what_ranks_exchange_for_it_is_in_fp32() -> None:
    class Meeting(OneOf):
        def attend(self, projections: Any, lengths: Any, mask: Any = None) -> Any:
            raise Misfit(f"{projections[0]().projected[0].dtype}")

    tokens = Tokens(Meeting(0, 2))
    tokens.begin({"x": torch.zeros(1, 6, WIDTH)}, {"x": Cut(1, ("all",))})
    q = torch.zeros(1, 3, WIDTH).bfloat16()
    for precision, exchanged in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        with pytest.raises(Misfit, match=str(exchanged)):
            attend(tokens, [*tokens.runs.values()], False, q, q, q, HEADS, attn_precision=precision)


def test_ranks_attend_in_fp32_to_tokens_in_bf16(ranks: Ranks) -> None:
    for error, reason, told in ranks.run((1, 2, 1), "called", how="in fp32", text=TEXT, dtype="bfloat16")[:2]:
        assert (error <= 2e-2, reason) == (True, "")
        assert told.startswith("sequence 2 (")


@pytest.mark.parametrize("how", REFUSED)
def test_what_a_small_forward_does_not_show_puts_the_image_on_one_rank(ranks: Ranks, how: str) -> None:
    """It is right all the same, although the network has written to its arguments by then."""
    for error, reason, told in ranks.run((1, WORLD, 1), "called", how=how, text=TEXT, dtype="float32"):
        assert error == 0
        assert reason.startswith("a call wasn't as the small forwards are: ")
        assert REFUSED[how] in reason
        assert "; tokens are not shared out: " in told
        assert REFUSED[how] in told


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 3, 1)], ids=str)
def test_ranks_that_do_not_all_know_of_it_go_on_to_plan_alike(ranks: Ranks, layout: tuple[int, ...]) -> None:
    """One is idle here."""
    found = ranks.run(layout, "called", how="causal", text=TEXT, dtype="float32")
    busy = math.prod(layout)
    assert [error <= FP32 for error, _, _ in found[:busy]] == [True] * busy
    assert [reason for _, reason, _ in found] == [""] * WORLD
    assert "; tokens are not shared out: an attention with is_causal" in found[0][2]


@pytest.mark.parametrize("how", REFUSED)
def test_what_a_small_forward_shows_is_found_out_at_load(ranks: Ranks, how: str) -> None:
    found = ranks.run((1, 1, 1), "checked", how=how, failing=-1, place=0)
    assert len({reason for reason, _ in found}) == 1
    assert REFUSED[how] in found[0][0]


@pytest.mark.parametrize("own_keys", [False, True])
def test_a_mask_as_long_as_the_keys_of_one_rank_is_exchanged_only_if_each_has_its_own(own_keys: bool) -> None:
    """Of five tokens this rank has three; the other one has two, and would refuse the mask."""

    class Meeting(Exception):
        pass

    def meet() -> None:
        raise Meeting

    tokens = Tokens(OneOf(0, 2), meet=meet)
    tokens.begin({"x": torch.zeros(1, 5, WIDTH)}, {"x": Cut(1, ("all",))})
    q = k = v = torch.zeros(1, 3, WIDTH)
    with pytest.raises(Meeting if own_keys else Misfit):
        attend(tokens, [*tokens.runs.values()], own_keys, q, k, v, 6, mask=torch.zeros(1, 1, 3))


def test_attention_to_near_tokens_of_two_kinds_misfits() -> None:
    tokens, given = Tokens(OneOf(0, 2)), {name: torch.zeros(1, 6, WIDTH) for name in ("text", "image")}
    tokens.begin({**given}, {name: Cut(1, (name,)) for name in given})
    q = k = v = torch.zeros(1, 3, WIDTH)
    with pytest.raises(Misfit, match="an attention of 3 tokens over 3 near ones"):
        attend_near(tokens, attention, q, k, v, 6, 2, 1)


def test_an_exchange_in_8_bits_is_refused_where_there_is_none() -> None:
    asked = Request(exchange="int8", ulysses=3)
    for over in ({}, {"qkv": LinearAttention()}):
        made = network(over=over)
        made.use_table(3)
        given = inputs(made, 0, TEXT)
        if not over:
            assert "exchanged in 8 bits" in str(plan_for(made, asked, 3, given))
            continue
        with pytest.raises(ArgumentError, match="exchanges what has no encoding in 8 bits; leave exchange out"):
            plan_for(made, asked, 3, given)


@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_a_call_of_tensors_for_other_numbers_of_images_stays_on_one_rank(images: int) -> None:
    """Its error, in the middle of a forward that ranks share, would cost the ranks."""
    made = network()
    made.use_table(3)
    given = inputs(made, 0, TEXT)
    other = Inputs({**given, "context": torch.zeros(images, TEXT, WIDTH)}, given.specs)
    plan = plan_for(made, Request(cfg_parallel=False), 3, other)
    assert plan.layout.sequence == (3 if images in (1, 2) else 1)
    if images in (0, 3):
        assert made.unchecked(other) == "context is for another number of images"
        with pytest.raises(ArgumentError, match="context is for another number of images; ask for auto"):
            plan_for(made, Request(ulysses=3), 3, other)


# --- what is said of a forward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "text", "said"),
    [
        ((1, 3, 1), 2, "sequence 1 on each rank, not sequence 3: only 2 tokens of text"),
        ((2, 2, 1), 1, "batch 2 × sequence 1 on each rank, not sequence 2: only 1 tokens of text"),
        ((1, 3, 1), 3, "sequence 3 (ulysses; "),
    ],
)
def test_a_text_that_is_too_short_for_so_many_ranks_is_told(
    ranks: Ranks, layout: tuple[int, ...], text: int, said: str
) -> None:
    for error, reason, told in ranks.run(layout, "called", how="plain", text=text, dtype="float32")[:3]:
        assert (error <= FP32, reason) == (True, "")
        assert told.startswith(said)


# --- a load in which one rank fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 3])
@pytest.mark.parametrize("place", range(4))
def test_all_ranks_hear_at_once_of_an_error_of_one(ranks: Ranks, place: int, failing: int) -> None:
    """Otherwise the others would wait for it in an exchange, for as long as a load may take."""
    found: list[Any] = ranks.run((1, 1, 1), "checked", how="plain", failing=failing, place=place)
    reason = f"with sequence {WORLD} (ulysses) a small forward failed (ValueError: this rank is angry)"
    assert [each for each, _ in found] == [reason] * WORLD
    # Gloo's own limit is 60 s here.
    assert max(seconds for _, seconds in found) < 30
    # And they still meet each other at the same exchanges.
    found = ranks.run((1, 1, 1), "checked", how="plain", failing=-1, place=0)
    assert [each for each, _ in found] == [""] * WORLD
