"""The step cache: what it skips and what it gives; that it keeps little, and nothing of another run.

test_conformance.py has it with every family, on one rank and on several.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import FLUX, SD3
from torch import Tensor

from tacod import embedded
from tacod.checkpoint import read_checkpoint
from tacod.group.work import Command, Envelope, Forward, Sample, SampleStep, Stepped
from tacod.plan import Request
from tacod.rank.arguments import digest
from tacod.rank.engine import Engine
from tacod.rank.families.base import DiT
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.families.trunk import Trunk
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, plan_for
from tacod.rank.forward.step_cache import RUNS, StepCache
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod_client import wire
from tacod_client.errors import ArgumentError, OutOfMemory
from tacod_client.tensors import to_wire

ALL = 1e9
STEPS = 12


@pytest.fixture
def sd3() -> DiT:
    return copy.deepcopy(SD3.model)


def conditioning(model: DiT) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    values = {"context": torch.randn(1, 6, 8, generator=generator), "y": torch.randn(1, 6, generator=generator)}
    return {**values, "guidance": torch.full((1,), 3.5)} if model is FLUX.model else values


def walk(
    model: DiT,
    forwards: Forwards,
    threshold: float,
    given: Mapping[str, Any] | None = None,
    levels: tuple[float, ...] = tuple(torch.linspace(1, 0.1, STEPS).tolist()),
    steps: tuple[Any, ...] = ("run",),
    size: int = 10,
) -> tuple[list[Tensor], list[bool]]:
    """The outputs along a run, and which forwards were skipped."""
    given = conditioning(model) if given is None else given
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, size, size, generator=generator)
    outs, skipped = [], []
    for level in levels:
        timestep = model.timestep(torch.tensor([level])).float()
        inputs = Inputs({"x": x, "timestep": timestep, **given}, model.arguments())
        plan = plan_for(model, Request(step_cache=threshold), 1, inputs)
        before = forwards.skipped
        with torch.inference_mode():
            out = forwards(Call(model, plan, inputs, steps))
        assert isinstance(out, Tensor)
        outs.append(out)
        skipped.append(forwards.skipped > before)
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return outs, skipped


def alone() -> Forwards:
    return Forwards(Topology())


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# --- what it gives ----------------------------------------------------------------------------------------------------


def through(cache: StepCache | None, tokens: Tensor, *blocks: Callable[[Tensor], Tensor]) -> Tensor:
    """A stream of these tokens after these blocks."""
    f = ForwardPass(SequenceParallel())
    f.image = Stream(tokens, (tokens.shape[1],))

    def act(change: Callable[[Tensor], Tensor]) -> Callable[[ForwardPass], None]:
        def block(f: ForwardPass) -> None:
            f.image.tokens = change(f.image.tokens)

        return block

    Trunk(f, [act(block) for block in blocks], {}).run(cache)
    return f.image.tokens


def test_a_skipped_forward_runs_its_first_block_alone_and_adds_what_the_others_gave() -> None:
    ran = []

    def block(n: int) -> Callable[[Tensor], Tensor]:
        def change(tokens: Tensor) -> Tensor:
            ran.append(n)
            return tokens * 1.25 + n

        return change

    def run(tokens: Tensor) -> Tensor:
        ran.clear()
        return through(cache, tokens, *map(block, (1, 2, 3)))

    cache = StepCache(0.1, 1.0)
    tokens = torch.arange(12.0).view(1, 3, 4)
    computed = run(tokens)
    assert (ran, cache.skipped) == ([1, 2, 3], False)
    near = tokens * 1.01
    added = run(near) - (near * 1.25 + 1)
    assert (ran, cache.skipped) == ([1], True)
    torch.testing.assert_close(added, computed - (tokens * 1.25 + 1))
    far = run(tokens * 2)
    assert (ran, cache.skipped) == ([1, 2, 3], False)
    assert torch.equal(far, through(None, tokens * 2, *map(block, (1, 2, 3))))


def test_steps_are_compared_with_the_last_computed_one() -> None:
    """Small changes add up: what was skipped is no measure."""
    cache = StepCache(0.1, 1.0)

    def is_skipped(residual: float) -> bool:
        start = torch.zeros(1, 2, 2)
        through(cache, start, lambda tokens: tokens + residual, lambda tokens: start + 3)
        return cache.skipped

    assert [is_skipped(residual) for residual in (1.0, 1.06, 1.12, 1.18, 1.24)] == [False, True, False, True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_skipped(value: float) -> None:
    cache = StepCache(ALL, 1.0)
    start = torch.zeros(1, 2, 2)
    for _ in range(3):
        through(cache, start, lambda tokens: tokens + value, lambda tokens: start)
        assert not cache.skipped


def test_a_model_of_one_block_is_exact() -> None:
    cache = StepCache(ALL, 1.0)
    for n in range(3):
        tokens = torch.full((1, 2, 2), float(n))
        out = through(cache, tokens, lambda tokens: tokens + 1)
        assert torch.equal(out, tokens + 1)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_where_noise_rises_a_new_run_begins() -> None:
    model, forwards = FLUX.model, alone()
    levels = (0.9, 0.8, 0.8, 0.7, 0.75, 0.7)
    assert walk(model, forwards, ALL, levels=levels)[1] == [False, True, True, True, False, True]
    outs, skipped = walk(model, forwards, ALL, levels=(0.9, 0.5))
    assert skipped == [False, True]
    assert torch.equal(outs[0], walk(model, alone(), 0, levels=(0.9,))[0][0])


@pytest.mark.parametrize(
    ("threshold", "steps", "size"), [(ALL, ("other",), 10), (ALL / 2, ("run",), 10), (ALL, ("run",), 12)]
)
def test_another_run_plan_or_shape_reuses_nothing(threshold: float, steps: tuple[str], size: int) -> None:
    model, forwards = FLUX.model, alone()
    walk(model, forwards, ALL, levels=(0.9, 0.8))
    assert walk(model, forwards, threshold, levels=(0.7,), steps=steps, size=size)[1] == [False]
    assert walk(model, forwards, ALL, levels=(0.7,))[1] == [True]


def test_little_is_kept_and_nothing_of_a_model_that_is_gone(sd3: DiT) -> None:
    forwards = alone()
    for run in range(RUNS + 3):
        walk(sd3, forwards, ALL, levels=(0.9,), steps=(run,))
        assert len(forwards.step_caches) == min(run + 1, RUNS)
    assert walk(sd3, forwards, ALL, levels=(0.8,), steps=(RUNS + 2,))[1] == [True]
    assert walk(sd3, forwards, ALL, levels=(0.8,), steps=(0,))[1] == [False], "the oldest had gone"
    other = copy.deepcopy(sd3)
    walk(other, forwards, ALL, levels=(0.9,))
    assert len(forwards.step_caches) == RUNS + 1
    del other
    assert len(forwards.step_caches) == RUNS
    forwards.clear()
    assert len(forwards.step_caches) == 0


def test_a_controlnet_is_never_skipped_and_ends_the_run() -> None:
    model, forwards = FLUX.model, alone()
    residual = to_wire(torch.randn(1, 25, 80), "control")
    controlled = {**conditioning(model), "control": Control({"input": [residual], "output": [residual]})}
    assert walk(model, forwards, ALL, levels=(0.9, 0.8))[1] == [False, True]
    outs, skipped = walk(model, forwards, ALL, controlled, levels=(0.7, 0.6))
    assert skipped == [False, False]
    assert equal(outs, walk(model, alone(), 0, controlled, levels=(0.7, 0.6))[0])
    assert walk(model, forwards, ALL, levels=(0.5, 0.4))[1] == [False, True]


def test_digests_tell_arguments_apart() -> None:
    one = {"context": to_wire(torch.zeros(2, 3), "context"), "ref_latents": [to_wire(torch.ones(2), "ref")], "m": "uxo"}
    again = {"m": "uxo", "ref_latents": [to_wire(torch.ones(2), "ref")], "context": to_wire(torch.zeros(2, 3), "c")}
    assert digest(one) == digest(again)
    assert hash(digest(one)) == hash(digest(again))
    others: list[dict[str, Any]] = [
        {**one, "context": to_wire(torch.zeros(3, 2), "context")},
        {**one, "context": to_wire(torch.full((2, 3), 1e-9), "context")},
        {**one, "ref_latents": []},
        {**one, "m": "index"},
        {**one, "rope_options": {"scale_x": 1.0}},
    ]
    assert len({digest(each) for each in (one, *others)}) == 6


# --- through the engine -----------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Engine:
    engine = Engine(torch.device("cpu"), Topology())
    engine.load("m", str(embedded.PATH), read_checkpoint(str(embedded.PATH)).identity, "fp32", None, None, [])
    return engine


Asked = Callable[..., Any]


@pytest.fixture
def asked(engine: Engine) -> Asked:
    """Asks for a forward, and tells how many were skipped of it."""

    def ask(level: float, prompt: str = embedded.PROMPTS[0], session: bytes = b"a", plan: Any = None) -> int:
        context, y = embedded.encode(prompt)
        arguments = {"x": torch.ones(1, 16, 8, 8), "timestep": torch.tensor([1000 * level]), "context": context, "y": y}
        packed = {name: to_wire(value, name) for name, value in arguments.items()}
        return work(engine, Forward("m", plan or {"step_cache": ALL}, packed, session)).skipped

    return ask


def work(engine: Engine, command: Command, forget: tuple[str, ...] = ()) -> Stepped:
    result = engine.work(Envelope(1, command, forget=list(forget))).result
    assert isinstance(result, Stepped)
    return result


def sample(seed: int = 0, cfg: float = 4.0) -> Sample:
    (context, y), (no_context, no_y) = embedded.encode(embedded.PROMPTS[0]), embedded.encode("")
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    tensors: dict[str, Any] = {"noise": noise, "latent": torch.zeros_like(noise), "sigmas": torch.linspace(1, 0, 8)}
    conditions = {"positive": {"context": context, "y": y}, "negative": {"context": no_context, "y": no_y}}
    return Sample(
        model="m",
        plan={"step_cache": ALL},
        sampler="euler",
        seed=seed,
        cfg=cfg,
        **{name: to_wire(value, name) for name, value in tensors.items()},
        **{name: {key: to_wire(value, key) for key, value in each.items()} for name, each in conditions.items()},
    )


def test_forwards_of_one_conditioning_and_session_are_a_run(asked: Asked) -> None:
    assert [asked(level) for level in (0.9, 0.8, 0.7)] == [0, 1, 1]
    assert asked(0.6, prompt=embedded.PROMPTS[1]) == 0
    assert asked(0.6, session=b"b") == 0
    assert asked(0.6, plan={"step_cache": 1.5}) == 0
    assert asked(0.6) == 1
    assert asked(0.9) == 0


def test_without_a_step_cache_nothing_is_kept(asked: Asked, engine: Engine) -> None:
    assert [asked(level, plan="auto") for level in (0.9, 0.8)] == [0, 0]
    assert [asked(level, plan={"step_cache": 0}) for level in (0.9, 0.8)] == [0, 0]
    assert len(engine.forwards.step_caches) == 0


def test_jobs_keep_to_themselves_and_leave_nothing(engine: Engine) -> None:
    """Two that alternate, one of which is given up; both skip as if they were alone."""
    inputs = {"one": sample(0), "two": sample(1)}
    told: dict[str, list[int]] = {"one": [], "two": []}
    for step in range(7):
        for job in inputs if step < 4 else ["one"]:
            forget = ("two",) if step == 4 else ()
            answer = work(engine, SampleStep(job, step, inputs[job] if step == 0 else None), forget)
            told[job].append(answer.skipped)
        assert len(engine.forwards.step_caches) == (2 if step < 4 else 1 if step < 6 else 0)
    assert told == {"one": [0, 1, 1, 1, 1, 0, 1], "two": [0, 1, 1, 1]}
    assert "step cache 1e+09" in answer.plan


def test_conditions_that_are_no_batch_have_a_cache_each(engine: Engine) -> None:
    inputs = sample()
    assert inputs.negative is not None
    context = torch.zeros(1, 9, 96)
    inputs = replace(inputs, negative={"context": to_wire(context, "context"), "y": inputs.negative["y"]})
    told = [work(engine, SampleStep("j", n, inputs if n == 0 else None)) for n in range(3)]
    assert [(answer.forwards, answer.skipped) for answer in told] == [(2, 0), (2, 2), (2, 2)]
    assert len(engine.forwards.step_caches) == 2


def test_a_lack_of_memory_takes_what_is_kept(engine: Engine, asked: Asked) -> None:
    asked(0.9)
    assert len(engine.forwards.step_caches) == 1
    with pytest.raises(OutOfMemory), engine.memory_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB. Of")
    assert len(engine.forwards.step_caches) == 0
    assert asked(0.8) == 0


def test_an_unloaded_model_takes_what_is_kept(engine: Engine, asked: Asked) -> None:
    asked(0.9)
    engine.unload("m", [])
    assert len(engine.forwards.step_caches) == 0


@pytest.mark.parametrize("value", [-1, "0.1", True, float("nan")])
def test_a_bad_threshold_is_refused_by_name(asked: Asked, value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^plan: step_cache: expected a number from 0") as caught:
        asked(0.9, plan={"step_cache": value})
    assert caught.value.argument == "plan"


def test_a_wire_tensor_without_a_digest_gets_one() -> None:
    tensor = wire.Tensor("F32", (1,), (b"\0\0\0\0",))
    assert digest(tensor) == tensor.with_digest().digest
