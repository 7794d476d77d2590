"""``tacoctl keygen``: a pair of CURVE keys, for a client or for the daemon."""

from __future__ import annotations

import argparse
from pathlib import Path

from tacod_client.cli import show
from tacod_client.cli.output import document
from tacod_client.curve import make_keys, own_folder, read_public_key

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Make the keys, and say what to do with them."""
    folder = Path(args.folder) if args.folder else own_folder()
    secret, public = make_keys(folder, args.name)
    key = read_public_key(public).decode()
    if "json" in args:
        document({"secret": str(secret), "public": str(public), "public_key": key})
        return
    show.out(f"{secret}: secret; it stays here, readable by its owner alone")
    show.out(f"{public}: public, {key}")
    show.out(
        "The public key of a client goes into the daemon's folder curve.clients, that of the daemon to each client,"
    )
    show.out(f"as {own_folder() / 'server.key'} or wherever TACOD_CURVE_SERVER_KEY says.")
