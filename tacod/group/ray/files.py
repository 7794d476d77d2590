"""Model files on several hosts: each host reads its own, if that is what the supervisor's host has.

A file is known by its contents (`Checkpoint.contents`), not by times, which copies change.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from tacod.checkpoint import locate, read_checkpoint
from tacod.group.work import Load, read_envelope
from tacod_client.errors import ModelError, ModelNotFound, TacodError
from tacod_client.wire import Message

__all__ = ["FoundFile", "NamedFile", "find_files", "look_for", "use_found"]


class NamedFile(TypedDict):
    """A file of a load, as the supervisor's host has it."""

    path: str
    contents: str


class FoundFile(TypedDict):
    """The same on another host."""

    path: str
    """As it is named in the load."""
    there: str
    """Its real path on this host."""
    identity: str
    """Its `Checkpoint.identity` there; empty if it can't be used."""
    error: dict[str, Any] | None
    """Why it can't be used, as a `TacodError` on the wire."""


def find_files(load: Load) -> list[NamedFile]:
    """The files that a load names, and their contents; empty if one has changed or gone: ranks will say so."""
    named: list[NamedFile] = []
    for path, identity in {load.path: load.identity, **load.files}.items():
        try:
            checkpoint = read_checkpoint(path)
        except ModelError:
            return []
        if checkpoint.identity != identity:
            return []
        named.append({"path": path, "contents": checkpoint.contents})
    return named


def look_for(files: Sequence[NamedFile], roots: Sequence[str]) -> list[FoundFile]:
    """Where this host has these files: at the same path, within the same roots once links are resolved here."""
    return [_look_for(file, roots) for file in files]


def _look_for(file: NamedFile, roots: Sequence[str]) -> FoundFile:
    found: FoundFile = {"path": file["path"], "there": "", "identity": "", "error": None}
    what = f"host {socket.gethostname()}: {file['path']}"
    try:
        there = locate(file["path"], roots)
        checkpoint = read_checkpoint(there)
    except TacodError as error:
        problem = type(error)(f"{what}: {error.message}; each host of the group reads its own: copy it there")
        return {**found, "error": problem.to_wire()}
    if checkpoint.contents != file["contents"]:
        different = ModelNotFound(
            f"{what} is another file than on tacod's host, by size, header or samples of its contents; copy that one "
            "there, or keep both on one file system"
        )
        return {**found, "error": different.to_wire()}
    return {**found, "there": there, "identity": checkpoint.identity}


def use_found(message: Message, found: Sequence[FoundFile], refused: dict[str, Any] | None) -> Message:
    """The message of a load with this host's files in place of the supervisor's, or ``refused`` for this error."""
    envelope = read_envelope(message)
    command = envelope.command
    assert isinstance(command, Load)
    if refused is not None:
        return replace(envelope, command=replace(command, refused=refused)).message()
    places: Mapping[str, FoundFile] = {each["path"]: each for each in found}
    if not places:
        return message

    def there(path: str) -> str:
        return places[path]["there"] or path

    patches = command.patches
    if patches is not None:
        patches = [{**patch, "path": there(patch["path"])} if "path" in patch else patch for patch in patches]
    changed = replace(
        command,
        path=there(command.path),
        identity=places[command.path]["identity"],
        patches=patches,
        files={there(path): places[path]["identity"] for path in command.files},
    )
    return replace(envelope, command=changed).message()
