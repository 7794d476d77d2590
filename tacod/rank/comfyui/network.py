"""A network of ComfyUI's as a `DiT` of ours: the same wire, plans, patches and promises, and its own code within.

Images of a batch are shared out in any case. The tokens of an image are too where a table says how (`tacod.rank.
comfyui.tables`) and where a small forward, at each load, shows that it is true.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tacod.checkpoint import TensorInfo
from tacod.plan import Layout, Plan, Request
from tacod.rank.comfyui.follow import count_blocks, followed
from tacod.rank.comfyui.residuals import ResidualList
from tacod.rank.comfyui.split import Split
from tacod.rank.comfyui.tables.base import Table
from tacod.rank.comfyui.tables.calls import mismatch, of_other_images, shapes_of
from tacod.rank.comfyui.tokens import Misfit, Tokens
from tacod.rank.families.base import DiT, Method, Output
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Anything, Inputs, Residuals, Spec
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass
from tacod.rank.families.trunk import BlockCache, BlockWatch
from tacod.rank.forward.host_copies import HostCopies
from tacod.rank.forward.side_effects import SideEffects
from tacod.rank.oom import describe_oom
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.called import Called
from tacod.rank.weights.stage import Stage
from tacod_client.errors import ArgumentError, Cancelled, EngineError, TacodError
from tacod_client.text import encodable, shortened

__all__ = ["FAMILY", "OPTIONS", "Network"]

FAMILY = "comfyui"
"""The name that users see."""
OPTIONS = "transformer_options"
"""ComfyUI's map of options for a call, of which clients send what is no code."""
_BY_CALL = ("cond_or_uncond", "uuids")
"""Options that tell something of each part of a batch, so that it can't be shared out."""
_CALLED = ("preprocess_text_embeds",)
"""Methods that ComfyUI calls outside of a forward."""
CONTROL = "control"
"""ComfyUI's map of lists of a ControlNet's residuals."""
LONGEST_NAME = 64
LONGEST_ERROR = 400
NETWORKS_OWN = 2
"""The first two of a network's arguments are latents and timesteps, whatever their names are."""

log = logging.getLogger(__name__)


class Network(DiT):
    """A network of ComfyUI's.

    Args:
        network: The module, with weights.
        dtype: The compute dtype.
        version: ComfyUI's, in words.
        renamed: Its names of weights, by those of the file where they differ.
        units: The paths of modules that may be stored and fetched each by itself.
        table: How its tokens are split; None if nothing is known.
        seed_of: ComfyUI's seed for a weight's name, for weights that are rounded at random.
        together: Whether it looks at several images of a batch at once, so that these can't be shared out.
    """

    family: ClassVar[str] = FAMILY
    title = "ComfyUI's own networks"
    models = ()
    image_models: ClassVar[tuple[str, ...]] = ()
    usual: ClassVar[Mapping[str, int]] = {}
    process = Flow()
    shares_output = False
    is_ours = False
    around: SideEffects | HostCopies | None = None
    """What its network's code runs in while its forward is made a CUDA graph."""
    unsampled = "what ComfyUI's own network asks of each step"

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        version: str,
        renamed: Mapping[str, str] | None = None,
        units: Sequence[str] = (),
        table: Table | None = None,
        seed_of: Callable[[str], int] = hash,
        together: bool = False,
    ) -> None:
        super().__init__()
        self.inner = network
        self.heads = self.width = 1
        self._dtype = dtype
        self._comfyui = version
        self._renamed = dict(renamed or {})
        self._units = list(units)
        self._called: Called | None = None
        self._table = table
        self._seed_of = seed_of
        self._together = together
        self._split: Split | None = None
        self._meet: Callable[[], None] | None = None
        self._ranks = 0
        self._refused = ""
        """What of the last call misfitted the table, although the small forwards didn't."""
        self._residuals: Residuals | None = None
        """What it takes of a ControlNet; None if that isn't known."""
        self.probes: list[dict[str, Any]] = []
        """The arguments of the small forwards by which the table is checked; empty if it isn't taken up."""
        self.reason = "this version has no table of its blocks"
        """Why the tokens of an image aren't shared out; empty if they are."""
        self._parameters_of_call, self._passes_on = _signature(network)
        self._blocks = [
            block
            for each in network.children()
            if isinstance(each, nn.ModuleList | nn.ModuleDict) and len(each) > 1
            for block in each.children()
        ]
        count_blocks(self._blocks)

    # --- what is asked of a family ------------------------------------------------------------------------------------

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """ComfyUI's detection is another one: see `tacod.rank.comfyui.loading`."""
        return None

    @property
    def name(self) -> str:
        """The class of the network."""
        return type(self.inner).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self._dtype

    @property
    def network(self) -> str:
        """In words, whose network it is, and what is shared out."""
        said = f"ComfyUI {self._comfyui}: {self.name}"
        return f"{said}; tokens are not shared out: {self.reason}" if self.reason else said

    @property
    def shares_tokens(self) -> bool:
        """Whether an image's tokens may be shared out."""
        return not self.reason

    def arguments(self) -> dict[str, Spec]:
        """Those of the network's own signature."""
        named = {name: Anything(required) for name, required in self._parameters_of_call.items()}
        added = {} if self._residuals is None else {CONTROL: self._residuals}
        tensor = Anything(True, tensor=True)
        return {"x": tensor, "timestep": tensor, **named, OPTIONS: Anything(), **added}

    def specs_for(self, given: Iterable[str]) -> dict[str, Spec]:
        """As ComfyUI does, a network that passes arguments on gets others too.

        Raises `ArgumentError` for what reaches into its blocks.
        """
        specs = self.arguments()
        for name in given:
            if name == CONTROL and CONTROL not in specs:
                raise ArgumentError(
                    f"{name}: ComfyUI's own network {self.name} takes no ControlNet's residuals; leave it out",
                    argument=name,
                )
            if self._passes_on and isinstance(name, str) and name.isidentifier() and len(name) <= LONGEST_NAME:
                specs.setdefault(name, Anything())
        return specs

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """About how many tokens there are; one if that isn't known."""
        if self._table is None or all(mismatch(probe, arguments).unknown for probe in self.probes):
            return (1,)
        return self._table.lengths(self.inner, shapes_of(arguments))

    def limited(self, asked: Request, arguments: Mapping[str, Any]) -> Request:
        """See `DiT.limited`: without a table that was checked with such arguments an image stays on one rank."""
        for name in ("step_cache", "attention"):
            if getattr(asked, name) not in (None, 0, "exact"):
                raise ArgumentError(
                    f"plan: {name} is for this version's own families, and {self.name} is ComfyUI's; leave it out",
                    argument="plan",
                )
        if asked.flash_attention is False:
            raise ArgumentError(
                f"plan: {self.name} is ComfyUI's, which chooses its own attention; leave flash_attention out",
                argument="plan",
            )
        why = (
            "reads of which condition an image is" if any(n in (arguments.get(OPTIONS) or {}) for n in _BY_CALL) else ""
        )
        if self._together:
            why = "looks at several images of a batch at once"
        if why:
            if asked.cfg_parallel:
                raise ArgumentError(
                    f"plan: {self.name} {why}, so a batch stays together; leave cfg_parallel out", argument="plan"
                )
            asked = replace(asked, cfg_parallel=False)
        reason = self.reason or self.unchecked(arguments)
        if not reason:
            if asked.exchange == "int8" and self._table is not None and self._table.exchanges_exactly:
                raise ArgumentError(
                    f"plan: {self.name} exchanges what has no encoding in 8 bits; leave exchange out", argument="plan"
                )
            return asked
        degrees = (asked.sequence_parallel_degree, asked.ulysses, asked.ring)
        if any(degree is not None and degree > 1 for degree in degrees):
            raise ArgumentError(
                f"plan: the tokens of ComfyUI's {self.name} aren't shared out: {reason}; ask for auto", argument="plan"
            )
        return replace(asked, sequence_parallel_degree=1)

    def unchecked(self, arguments: Mapping[str, Any]) -> str:
        """What of a call's arguments the table wasn't checked with; empty if it was with all."""
        assert self._table is not None
        found = [mismatch(probe, arguments) for probe in self.probes]
        nearest = min(found, key=lambda each: each.count)
        if nearest.count:
            return nearest.reason
        if others := of_other_images(arguments):
            # The network may fail in the middle, on each rank in other words, and ranks would be lost by that.
            return f"{', '.join(others)} is for another number of images"
        if reason := self._table.unfit(self.inner, shapes_of(arguments)):
            return reason
        return "" if min(self.lengths(arguments)) >= 1 else "there are too few"

    def refusal(self, error: Exception) -> TacodError | None:
        """See `DiT.refusal`: whatever the network raises, but a stop, and faults of the device or of its memory."""
        if isinstance(error, Cancelled):
            return None
        if isinstance(error, TacodError):
            return error
        if isinstance(error, torch.AcceleratorError) or "CUDA" in str(error) or describe_oom(error) is not None:
            return None
        log.warning("ComfyUI's %s failed", self.name, exc_info=error)
        what = shortened(encodable(f"{type(error).__name__}: {error}"), LONGEST_ERROR)
        return EngineError(f"forward: ComfyUI's own network {self.name} failed: {what}")

    def methods(self) -> Mapping[str, Method]:
        """See `DiT.methods`: those of ComfyUI's that the network has."""
        found = {}
        for name in _CALLED:
            if (function := getattr(self.inner, name, None)) is not None:
                parameters = inspect.signature(function).parameters.items()
                specs = {key: Anything(each.default is each.empty) for key, each in parameters}
                found[name] = Method(specs, partial(self._with_weights, function))
        return found

    def _with_weights(self, function: Callable[..., Output], *args: Any, **arguments: Any) -> Output:
        """A method of the network's, with its weights."""
        with self._fetching():
            return function(*args, **arguments)

    # --- the forward --------------------------------------------------------------------------------------------------

    def run(
        self,
        sequence: SequenceParallel,
        inputs: Inputs,
        cache: BlockCache | None = None,
        prefix: Sequence[Tensor] | None = None,
        watch: BlockWatch | None = None,
    ) -> Output:
        """See `DiT.run`: one call of the network, with what ComfyUI passes to it."""
        shares = self._split is not None and sequence.size > 1
        if self._split is not None:
            self._refused = ""
        with followed(len(self._blocks), watch):
            try:
                # It may write to its arguments, and be called once more.
                out = self._call(inputs.clone(), sequence) if shares else self._call(inputs)
            except Misfit as misfit:
                if not shares or self._meet is not None or (self.around is not None and self.around.captures):
                    raise
                # All ranks of the sequence come here, for they call alike, and each of them can compute all of it.
                self._refused = str(misfit)
                if sequence.size == self._ranks:
                    # No rank is elsewhere, and would go on to plan otherwise.
                    self.distrust(f"a call wasn't as the small forwards are: {misfit}")
                out = self._call(inputs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        # As ComfyUI, which packs several latents and takes a list of one as it is.
        return outs[0].contiguous() if len(outs) == 1 else [each.contiguous() for each in outs]

    def _call(self, inputs: Inputs, sequence: SequenceParallel | None = None) -> Any:
        """What the network gives, with an image's tokens shared out over a ``sequence`` if there is one."""
        around = nullcontext() if self.around is None else self.around.around(inputs.tensors)
        values = dict(inputs)
        x, timestep, context = values.pop("x"), values.pop("timestep"), values.pop("context", None)
        options, control = dict(values.pop(OPTIONS, {})), self._control(values.pop(CONTROL, None), x)
        shared: AbstractContextManager[None] = nullcontext()
        if sequence is not None and self._split is not None and self._table is not None:
            frame, leading = self._table.frame(self.inner, shapes_of(inputs)), self._table.leading(self.inner, inputs)
            tokens = Tokens(sequence, frame, leading, self._meet or (lambda: None))
            shared = self._split.sharing(tokens, options)
        with self._fetching(), shared, self._forgetting(), around:
            return self.inner(x, timestep, context=context, control=control, transformer_options=options, **values)

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """A context for a call of a network of which nothing is kept for the next one."""
        try:
            yield
        finally:
            if (forget := getattr(self.inner, "clear_kv_cache", None)) is not None:
                # It keeps keys by the address of a tensor, which another call's may have then.
                forget()

    @contextmanager
    def meeting(self, meet: Callable[[], None]) -> Iterator[None]:
        """A context in which ranks call ``meet`` before each exchange, and a call that misfits the table fails."""
        self._meet = meet
        try:
            yield
        finally:
            self._meet = None

    def told(self, plan: Plan) -> str:
        """See `DiT.told`: where tokens weren't shared out as planned, that and why."""
        if self._refused:
            return f"{plan}; tokens are not shared out: {self._refused}"
        if plan.layout.sequence == 1 or self._split is None or not self._split.unshared:
            return str(plan)
        alone = Layout(plan.layout.batch, 1, 1)
        return f"{alone} on each rank, not sequence {plan.layout.sequence}: {self._split.unshared}"

    @property
    def outcome(self) -> tuple[str, str]:
        """Why each rank has computed all tokens of the last forward, by the call and by the tokens; for `told`."""
        return self._refused, "" if self._split is None else self._split.unshared

    @outcome.setter
    def outcome(self, outcome: tuple[str, str]) -> None:
        self._refused, unshared = outcome
        if self._split is not None:
            self._split.unshared = unshared

    def _control(self, control: Control | None, x: Any) -> dict[str, Any] | None:
        """A ControlNet's residuals as ComfyUI gives them."""
        if control is None or self._residuals is None:
            return None
        whole, device = self._residuals.whole, (x[0] if isinstance(x, list) else x).device

        def shared() -> Any:
            return None if self._split is None else self._split.image

        return {name: ResidualList(control, name, shared, whole, device) for name in control.residuals}

    # --- weights ------------------------------------------------------------------------------------------------------

    @property
    def blocks_at(self) -> list[str]:
        """See `DiT.blocks_at`: the modules that may be stored and fetched each by itself."""
        return self._units

    def _fetching(self) -> AbstractContextManager[None]:
        """A context in which modules have their weights in place as they are called."""
        if not isinstance(self.weights, Stage):
            return nullcontext()
        if self._called is None or self._called.stage is not self.weights:
            self._called = Called(self.weights)
        return self._called.forward()

    def get_submodule(self, target: str) -> nn.Module:
        """A module by the network's own name of it."""
        return self.inner.get_submodule(target)

    def named_weights(self) -> dict[str, Tensor]:
        """Its weights and buffers, by its own names."""
        return {**dict(self.inner.named_parameters()), **dict(self.inner.named_buffers())}

    def canonical(self, name: str) -> str:  # type: ignore[override]
        """The network's name of a weight, for the file's."""
        return self._renamed.get(name, name)

    def dtype_of(self, name: str, compute: torch.dtype) -> torch.dtype:
        """The dtype of a weight: its own, or the compute dtype if that is one of 8 bits."""
        weight = self.named_weights().get(name)
        return compute if weight is None or weight.dtype.itemsize == 1 else weight.dtype

    def own_weight(self, owner: nn.Module, leaf: str) -> Tensor | None:
        """See `DiT.own_weight`: of a layer of ComfyUI's that is quantized."""
        weight = owner._parameters.get(leaf)
        if weight is None or not hasattr(weight, "__tensor_flatten__"):
            return None
        numbers: Tensor = owner.convert_weight(weight)  # type: ignore[operator]
        return numbers

    def put_own_weight(self, owner: nn.Module, leaf: str, key: str, tensor: Tensor) -> bool:
        """See `DiT.put_own_weight`: it is quantized again as ComfyUI does, rounded at random from the same seed."""
        weight = owner._parameters.get(leaf)
        if weight is None or not hasattr(weight, "__tensor_flatten__"):
            return False
        owner.set_weight(tensor, seed=self._seed_of(f"diffusion_model.{key}"))  # type: ignore[operator]
        return True

    def twin(self) -> Network:
        """Another instance over the same tensors: setting its weights doesn't change this one."""
        memo: dict[int, Any] = {id(each): each for each in self.named_weights().values()}
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._modules["inner"] = copy.deepcopy(self.inner, memo)
        other._blocks = self._blocks
        return other

    # --- the split ----------------------------------------------------------------------------------------------------

    def use_table(self, ranks: int) -> None:
        """Take up the table, if there is one and the network is as it says. It is to be checked then (`check_split`).

        ``ranks`` is how many there are.
        """
        self._ranks = ranks
        if self._table is None:
            return
        try:
            self.heads, self.width = self._table.heads(self.inner), self._table.width(self.inner)
            if (added := self._table.control) is not None:
                self._residuals = Residuals(self.width, {added.name: added.count(self.inner)}, added.whole)
            split = Split(self.inner, self._table)
            self.probes = self._table.probes(self.inner)
        except (Misfit, AttributeError, LookupError, TypeError) as error:
            self.distrust(f"it isn't as this version's table says ({error})")
            return
        self._split, self.reason = split, ""

    def distrust(self, reason: str) -> None:
        """Share out tokens no more."""
        self._split, self.reason = None, reason
        log.warning("ComfyUI's %s runs on one rank for each image: %s", self.name, reason)

    @property
    def is_split(self) -> bool:
        """Whether there is a table that hasn't failed."""
        return self._split is not None

    @property
    def unshared(self) -> str:
        """Why each rank computed all tokens of the last forward that was to share them; empty if it didn't."""
        return self.reason if self._split is None else self._split.unshared

    # --- what there is none of ----------------------------------------------------------------------------------------

    @property
    def graphs(self) -> bool:
        """Whether forwards may be CUDA graphs: not where modules fetch their weights as they are called."""
        return self.weights is None

    @property
    def canvases(self) -> list[tuple[int | str, ...]]:
        """Nobody knows the latents' shapes before there are some."""
        return []

    def sampling(self) -> dict[str, Any]:
        """There is no sampling in the ranks."""
        return {}

    def timestep(self, sigma: Tensor) -> Tensor:
        """Only ComfyUI's samplers know."""
        raise NotImplementedError

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """The network does all of it: see `run`."""
        raise NotImplementedError

    @property
    def trunk(self) -> Sequence[Any]:
        """The engine runs none of its blocks."""
        return ()

    def end(self, f: ForwardPass) -> Output:
        """The network does all of it: see `run`."""
        raise NotImplementedError


def _signature(network: nn.Module) -> tuple[dict[str, bool], bool]:
    """What a network takes by name beside latents and timesteps, and whether it takes other names too.

    Each name is with whether it must be given.
    """
    parameters = list(inspect.signature(network.forward).parameters.values())
    inner = getattr(network, "_forward", None)
    further = list(inspect.signature(inner).parameters.values()) if inner is not None else []
    passes_on = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named: dict[str, bool] = {}
    for each in (*parameters[NETWORKS_OWN:], *(further[NETWORKS_OWN:] if passes_on else ())):
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name not in ("control", OPTIONS):
            # ComfyUI passes a context in any case.
            named.setdefault(each.name, each.default is each.empty and each.name != "context")
    return named, passes_on
