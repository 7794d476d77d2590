"""Model files on several hosts: each host reads its own, if that is what the supervisor's host has, or is sent that.

A host's own file is known by its contents (`Checkpoint.contents` and a sample of each tensor), not by times, which
copies change.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from tacod.checkpoint import Checkpoint, is_gguf, locate, read_checkpoint
from tacod.checkpoint.folder import is_folders, open_folder
from tacod.group.ray.cache import ModelCache, Piece
from tacod.group.work import Load, read_envelope
from tacod_client.errors import ModelCorrupt, ModelNotFound, TacodError
from tacod_client.wire import Message

__all__ = ["FoundFile", "NamedFile", "Part", "find_files", "found_at", "look_for", "problem", "use_found"]


class Part(Piece):
    """One of a model's files, as the supervisor's host has it."""

    source: str
    """Its real path."""


class NamedFile(TypedDict):
    """A file of a load, or a folder, as the supervisor's host has it."""

    path: str
    identity: str
    contents: str
    tensors: str
    """`Checkpoint.sample_tensors` there."""
    main: str
    """The name of the file that is opened; empty for a folder."""
    parts: list[Part]
    """What it is made of."""


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
    """The files that a load names, and their contents.

    Raises `ModelCorrupt` if one is no longer what it was when it was asked for, and what `read_checkpoint` does.
    """
    named: list[NamedFile] = []
    for path, identity in {load.path: load.identity, **load.files}.items():
        checkpoint = read_checkpoint(path)
        if checkpoint.identity != identity:
            raise ModelCorrupt(f"{path} has changed since it was asked for; load it again when it is complete")
        try:
            main, parts = _parts(path)
        except OSError as error:
            raise ModelNotFound(f"{error.filename or path}: {error.strerror}; load it again") from None
        named.append(
            {
                "path": path,
                "identity": identity,
                "contents": checkpoint.contents,
                "tensors": checkpoint.sample_tensors(),
                "main": main,
                "parts": parts,
            }
        )
    return named


def _parts(path: str) -> tuple[str, list[Part]]:
    """The name of the file that is opened, and what a model is made of."""
    if is_folders(path):
        folder = open_folder(path)
        main = "" if os.path.isdir(path) else os.path.basename(path)
        files = zip(folder.names, folder.files, strict=True)
    else:
        # Clients may have chosen its own name.
        main = "model.gguf" if is_gguf(path) else "model.safetensors"
        files = zip([main], [path], strict=True)
    return main, [{"name": name, "size": os.stat(source).st_size, "source": source} for name, source in files]


def look_for(files: Sequence[NamedFile], roots: Sequence[str], cache: ModelCache) -> list[FoundFile]:
    """Where this host has these files: at the same path, within the same roots once links are resolved here.

    Else where they are in its ``cache``, in which they stay until the next call.
    """
    cache.release()
    return [_look_for(file, roots, cache) for file in files]


def _look_for(file: NamedFile, roots: Sequence[str], cache: ModelCache) -> FoundFile:
    error: TacodError
    try:
        there = locate(file["path"], roots)
        checkpoint = read_checkpoint(there)
        if checkpoint.contents == file["contents"] and checkpoint.sample_tensors() == file["tensors"]:
            return found_at(file["path"], checkpoint)
        error = ModelNotFound("it is another file than on tacod's host, by size, header or samples of its contents")
    except TacodError as caught:
        error = caught
    try:
        with cache.explained():
            cached = cache.find(file["identity"], file["contents"], file["main"])
        if cached is not None:
            return found_at(file["path"], cached)
    except TacodError as caught:
        error = caught
    return {"path": file["path"], "there": "", "identity": "", "error": error.to_wire()}


def found_at(path: str, checkpoint: Checkpoint) -> FoundFile:
    """What lies at a ``path`` on tacod's host, where this host has it."""
    return {"path": path, "there": checkpoint.path, "identity": checkpoint.identity, "error": None}


def problem(path: str, error: TacodError) -> FoundFile:
    """A file that was to come to this host, and why it can't be used."""
    advice = "it also helps to copy the file there, or to keep models on a file system that all hosts have"
    told = type(error)(f"host {socket.gethostname()} can't use {path}: {error.message}; {advice}")
    return {"path": path, "there": "", "identity": "", "error": told.to_wire()}


def use_found(message: Message, found: Sequence[FoundFile], refused: dict[str, Any] | None) -> Message:
    """The message of a load with this host's files in place of the supervisor's, or ``refused`` for this error."""
    envelope = read_envelope(message)
    command = envelope.command
    assert isinstance(command, Load)
    if refused is not None:
        return replace(envelope, command=replace(command, refused=refused)).message()
    places: Mapping[str, FoundFile] = {each["path"]: each for each in found}
    patches = command.patches
    if patches is not None:
        patches = [{**patch, "path": places[patch["path"]]["there"]} if "path" in patch else patch for patch in patches]
    changed = replace(
        command,
        path=places[command.path]["there"],
        identity=places[command.path]["identity"],
        patches=patches,
        files={places[path]["there"]: places[path]["identity"] for path in command.files},
    )
    return replace(envelope, command=changed).message()
