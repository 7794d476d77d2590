"""Which models the ranks hold: what a load makes room for, and what new ranks must load again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from tacod.config import Models
from tacod.manifest import Manifest, Model
from tacod.store import Store
from tacod_client.errors import OutOfMemory, TacodError

__all__ = ["Residency"]

log = logging.getLogger(__name__)


class Residency:
    """What comes and goes with the work items, as they are handed out and answered.

    Patches' tensors stay in the store as long as their models are here. ``on_gone`` hears of each model that the ranks
    hold no more.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        preload: Iterable[Model],
        world_size: int,
        on_gone: Callable[[str], None],
    ) -> None:
        self._manifest = manifest
        self.restoring: Model | None = None
        """What the ranks load now, though no client asked."""
        self._store = store
        self._waiting = list(preload)
        self._world_size = world_size
        self._on_gone = on_gone
        self._evicting: list[str] = []
        """The models that go with the running work item: a load takes their place, or what they were made of goes."""
        self._short: tuple[str, str] | None = None
        """The job whose load found no memory, and the model that goes when it is tried again."""

    def want(self, models: Iterable[Model]) -> None:
        """Models that are to be there from now on."""
        coming = {model.id for model in self._coming}
        self._waiting += [model for model in models if model.id not in self._manifest and model.id not in coming]

    @property
    def _coming(self) -> list[Model]:
        """What the ranks load, or are to load, though no client asks."""
        return [*([self.restoring] if self.restoring is not None else []), *self._waiting]

    def restore_next(self) -> Model | None:
        """The next model that the ranks are to load though no client asks, if there is one."""
        if not self._waiting:
            return None
        self.restoring = self._waiting.pop(0)
        log.info("loading %s", self.restoring.path)
        return self.restoring

    def make_room(self, job_id: str, model: Model, limits: Models) -> list[str]:
        """The models that go with the load of ``model``, which a job asks for."""
        short = self._short
        self._evicting = self._manifest.to_evict(model, limits.memory_bytes, limits.variants)
        if not self._evicting and short is not None and short[0] == job_id and short[1] in self._manifest:
            self._evicting = [short[1]]
        self._short = None
        return self._evicting

    def go_too(self, model_id: str) -> list[str]:
        """The models that go with this one."""
        self._evicting, self._short = self._manifest.patched(model_id), None
        return self._evicting

    def keep_all(self) -> None:
        """The next work item is neither a load nor the end of a model."""
        self._evicting, self._short = [], None

    def note_evicted(self, why: str) -> None:
        """The ranks have done the work item, and hold no more what was to go with it."""
        for evicted in self._evicting:
            log.info("unloaded %s %s", evicted, why)
            self.forget(evicted)
        self._evicting = []

    def note_loaded(self, model: Model, told: dict[str, Any], elapsed_s: float) -> None:
        """The ranks hold a model, and its base, and tell about both."""
        facts = [(model, told["model"])]
        if model.base is not None:
            facts.insert(0, (model.base, told["base"]))
        for each, known in facts:
            if each.id not in self._manifest:
                self._store.pin(each.digests)
                resident = each.loaded(known, elapsed_s, self._world_size)
                self._manifest.add(resident)
                for note in resident.notes:
                    log.warning("%s: a patch was left out: %s", resident.name, note)

    def note_short(self, job_id: str, model: Model, error: TacodError) -> bool:
        """A load failed; whether it is worth another try, in the place of one more model."""
        other = self._manifest.next_to_go(model)
        if other is None or not isinstance(error, OutOfMemory):
            return False
        self._short = job_id, other.id
        return True

    def note_restored(self, told: dict[str, Any], error: TacodError | None, elapsed_s: float) -> None:
        """The ranks have loaded what no client asked for, or can't."""
        model, self.restoring = self.restoring, None
        assert model is not None
        if error is None:
            self.note_loaded(model, told, elapsed_s)
        else:
            self._give_up(model, error)

    def _give_up(self, model: Model, error: TacodError) -> None:
        log.error("%s can't be loaded: %s", model.path, error.message)
        self.forget(model.id)

    def forget(self, model_id: str) -> None:
        """The ranks hold a model no more."""
        if model_id in self._manifest:
            self._store.unpin(self._manifest.find(model_id).digests)
            self._manifest.remove(model_id)
            self._on_gone(model_id)

    def lose_group(self, error: TacodError | None) -> None:
        """The ranks are gone, maybe for an ``error`` that one of them gave: new ones load all that these held."""
        self.keep_all()
        if self.restoring is not None and isinstance(error, OutOfMemory):
            # New ranks would come to the same.
            self._give_up(self.restoring, error)
            self.restoring = None
        coming, self.restoring = self._coming, None
        self._waiting = [*self._manifest, *(model for model in coming if model.id not in self._manifest)]
