"""Which models the ranks hold, which ones make room for a load, and which ones new ranks must load again.

Models that make room are remembered. If a job's model isn't resident at its turn, it is loaded for that turn, so
clients take turns however little memory there is. Each such turn costs a load. A loaded model that others use therefore
stays at least as long as its load took: loads don't follow each other step by step, and nobody waits forever. A device
that turns out to hold less (`OutOfMemory`) isn't foreseen, so there each turn may cost a load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from tacod.config import Models
from tacod.execution.manifest import Manifest, Model
from tacod.execution.store import Store
from tacod.group.ranks import GroupLost
from tacod.group.work import Loaded
from tacod_client.errors import OutOfMemory, RankFailed, TacodError

__all__ = ["Residency"]

log = logging.getLogger(__name__)

STAYS_S = (0.05, 30.0)
"""The least and the most seconds that a model in use stays before it makes room."""
BETWEEN_S = 0.25
"""How long after a step its model counts as in use: a client that samples asks for the next one within this time."""


class Residency:
    """Decides which models are loaded and evicted, and notes it as work items (`WorkItem`) are handed out and done.

    In the store, the patches' tensors of resident models make room only after all others. ``on_evicted`` is called for
    each model that makes room.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        preload: Iterable[Model],
        world_size: int,
        on_evicted: Callable[[Model], None],
    ) -> None:
        self._manifest = manifest
        self._store = store
        self.coming = list(preload)
        """Models to load without a client's request, in order; the first one stays here until it is loaded."""
        self._world_size = world_size
        self._on_evicted = on_evicted
        self._stays_until: dict[str, float] = {}
        self._losses: dict[str, tuple[int, str]] = {}
        """How often the ranks were lost while they loaded a model without a client's request, and the last cause."""
        self._used: dict[str, tuple[bytes, float]] = {}
        """By which session each model was used last, and when."""
        self._fewer: dict[str, int] = {}
        """By how many blocks ranks stay below what they could hold of a model without patches, for want of memory."""
        self._anew: set[str] = set()
        """Of the models that are coming, those that hold other blocks only if what shares weights with them goes first.
        """

    def want(self, models: Iterable[Model]) -> None:
        """These models are to be resident from now on."""
        coming = {model.id for model in self.coming}
        self.coming += [model for model in models if model.id not in self._manifest and model.id not in coming]

    def restore_next(self) -> Model | None:
        """The next model to load without a client's request; None if there is none."""
        while self.coming:
            model = self.coming[0]
            if not self._store.lacks(model.digests):
                log.info("loading %s", model.path)
                return model
            self.coming.pop(0)
            log.info(
                "%s can't be loaded: its patches made room for others; its clients will send them again", model.path
            )
            self.forget(model.id)
        return None

    def resize(self, world_size: int) -> None:
        """The ranks are as many as this from now on; all models are to be loaded again."""
        if world_size != self._world_size:
            self._world_size = world_size
            self._manifest.resize(world_size)
            self.coming = [self._manifest.recall(each.id) or each.resized(world_size) for each in self.coming]

    # --- turns ----------------------------------------------------------------------------------------------------

    def recall(self, model_id: str) -> Model | None:
        """A model that is resident or can be loaded again; None if its client has to load it."""
        model = self._manifest.recall(model_id)
        if model is None or (model_id not in self._manifest and self._store.lacks(model.digests)):
            return None
        return model

    def note_used(self, model_id: str, session: bytes, now: float) -> None:
        """A session used a resident model, or was told that it is resident."""
        self._used[model_id] = session, now

    def is_put_off(self, model: Model, session: bytes, limits: Models, needed: Sequence[str], now: float) -> bool:
        """Whether a session's load must wait for models that others use.

        It waits while it would evict one of these that hasn't stayed long enough yet. ``needed`` are the models of
        others' jobs, the most urgent first.
        """

        def is_in_use(model_id: str) -> bool:
            last, at_s = self._used.get(model_id, (session, 0.0))
            return model_id in needed or (last != session and now < at_s + BETWEEN_S)

        going = self._manifest.to_evict(model, limits.memory_bytes, limits.variants, needed)
        return any(now < self._stays_until.get(each, 0.0) and is_in_use(each) for each in going)

    def has_room(self, model: Model, limits: Models) -> bool:
        """Whether a model can be loaded without others having to go, as far as that is known before."""
        return not self._manifest.to_evict(model, limits.memory_bytes, limits.variants)

    def make_room(self, model: Model, limits: Models, needed: Sequence[str], first: Iterable[str] = ()) -> list[str]:
        """The models to evict for the load of ``model``: the ``first`` ones in any case, if they are resident."""
        gone = [each for each in first if each in self._manifest]
        return self._manifest.to_evict(model, limits.memory_bytes, limits.variants, needed, gone)

    def room_for(self, model: Model, limits: Models, evicts: Sequence[str]) -> int | None:
        """How many bytes of weights the load of a model may take on each rank; None for no limit."""
        if limits.memory_bytes is None:
            return None
        own = {model.id, *([model.base.id] if model.base is not None else [])}
        staying = [each for each in self._manifest if each.id not in own and each.id not in evicts]
        return max(0, limits.memory_bytes - sum(each.weight_bytes for each in staying))

    def clear_for(self, job_model: str, needed: Sequence[str]) -> Model | None:
        """The patched model to evict because a step of ``job_model`` found no memory; None if there is none."""
        bases = [each.id for each in self._manifest if each.base is None]
        return self._manifest.next_to_go(self._manifest.find(job_model), bases, needed)

    def fewer(self, model: Model) -> int:
        """How many blocks fewer of a model the ranks are to hold than fit beside its forwards' other needs."""
        return self._fewer.get(_plain(model).id, 0)

    def shrink(self, model: Model, error: OutOfMemory) -> bool:
        """Have later loads of a model hold fewer blocks, as a load or a forward ran out of memory.

        One block fewer the first time, then twice as many each time, since each time costs a load. Returns false if the
        ranks hold as few as they can.
        """
        if not error.details.get("shrinks"):
            return False
        plain = _plain(model).id
        self._fewer[plain] = max(1, 2 * self._fewer.get(plain, 0))
        log.warning(
            "%s: %s; loading it again with %d block%s fewer on each rank",
            model.path,
            error.message,
            self._fewer[plain],
            "s" * (self._fewer[plain] > 1),
        )
        return True

    def regrow(self, model: Model) -> None:
        """After what even the fewest blocks leave no memory for, hold again what fits beside others.

        A resident model is loaded anew for that, without a client's request.
        """
        plain = _plain(model)
        if self._fewer.pop(plain.id, 0) and plain.id in self._manifest and plain.id not in self._anew:
            log.info("%s: loading it again with as many blocks as fit", plain.path)
            self.load_anew(plain)
            self.coming.append(plain)

    def load_anew(self, model: Model) -> None:
        """When a model that is coming is loaded, what shares weights with it is evicted first."""
        self._anew.add(model.id)

    def in_the_way(self, model: Model) -> list[str]:
        """The models to evict for a load without a client's request; see `load_anew`."""
        return self.sharing(model) if model.id in self._anew else []

    def sharing(self, model: Model) -> list[str]:
        """The resident models that share weights with this one, itself among them."""
        plain = _plain(model).id
        return [each for each in (*self._manifest.patched(plain), plain) if each in self._manifest]

    def note_evicted(self, evicts: Iterable[str]) -> None:
        """The ranks have done a work item and no longer hold the models that it evicts."""
        for model in [self._manifest.find(each) for each in evicts]:
            log.info("unloaded %s to make room", model.id)
            self._let_go(model)
            self._manifest.evict(model.id)
            self._on_evicted(model)

    def note_unloaded(self, model_ids: Iterable[str]) -> None:
        """The ranks no longer hold these models, and clients have to load them again."""
        for gone in model_ids:
            log.info("unloaded %s", gone)
            self.forget(gone)

    def note_loaded(self, model: Model, loaded: Loaded, elapsed_s: float, now: float) -> None:
        """The ranks hold a model and its base, and report on both."""
        facts = [(model, loaded.model)]
        if model.base is not None:
            facts.insert(0, (model.base, loaded.base))
        for each, known in facts:
            if each.id in self._manifest:
                self._manifest.note_placed(each.id, known)
            else:
                self._store.hold(each.digests)
                resident = each.loaded(known, elapsed_s, self._world_size)
                self._manifest.add(resident)
                least, most = STAYS_S
                self._stays_until[each.id] = now + min(max(elapsed_s, least), most)
                for note in resident.notes:
                    log.warning("%s: a patch was left out: %s", resident.name, note)

    def note_restored(self, model: Model, result: Loaded | TacodError, elapsed_s: float, now: float) -> None:
        """The ranks have loaded a model without a client's request, or could not."""
        self.coming.remove(model)
        self._anew.discard(model.id)
        self._losses.pop(model.id, None)
        if isinstance(result, Loaded):
            self.note_loaded(model, result, elapsed_s, now)
        else:
            self._give_up(model, result)

    def _give_up(self, model: Model, error: TacodError) -> None:
        log.error("%s can't be loaded: %s", model.path, error.message)
        self.forget(model.id)

    def forget(self, model_id: str) -> None:
        """The ranks no longer hold a model, or can't load it."""
        self._losses.pop(model_id, None)
        self._fewer.pop(model_id, None)
        self._anew.discard(model_id)
        if model_id in self._manifest:
            self._let_go(self._manifest.find(model_id))
        self._manifest.remove(model_id)

    def _let_go(self, model: Model) -> None:
        self._store.release(model.digests)
        self._stays_until.pop(model.id, None)
        self._used.pop(model.id, None)

    def lose_group(self, lost: GroupLost, retries: int, restoring: Model | None) -> bool:
        """The ranks are gone; new ones load all that these held.

        The model that they were ``restoring`` is given up like a job: at once for a lack of memory, the second time for
        the same cause, or after ``retries`` more tries. Returns whether it is given up.
        """
        given_up = restoring is not None and self._is_last(restoring.id, lost, retries)
        if restoring is not None and given_up:
            self.coming.remove(restoring)
            self._give_up(
                restoring, lost.error or RankFailed(f"the ranks ended each time they loaded it; last: {lost}")
            )
        self._anew.clear()
        self.coming = [*self._manifest, *(each for each in self.coming if each.id not in self._manifest)]
        return given_up

    def _is_last(self, model_id: str, lost: GroupLost, retries: int) -> bool:
        """Count the loss of the ranks to the model that they were loading; whether it isn't tried again."""
        losses, cause = self._losses.get(model_id, (0, ""))
        self._losses[model_id] = losses + 1, lost.cause
        again = lost.cause != "" and lost.cause == cause
        return losses >= retries or again or isinstance(lost.error, OutOfMemory)


def _plain(model: Model) -> Model:
    """The same model without patches."""
    return model.base or model
