"""``tacoctl keygen``: a pair of CURVE keys, for a client or for the daemon."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tacod_client.curve import make_keys, own_folder, read_public_key

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Make the keys, and say what to do with them."""
    folder = Path(args.folder) if args.folder else own_folder()
    secret, public = make_keys(folder, args.name)
    key = read_public_key(public).decode()
    if "json" in args:
        print(json.dumps({"secret": str(secret), "public": str(public), "public_key": key}, indent=2))
        return
    print(f"{secret}: secret; it stays here, readable by its owner alone")
    print(f"{public}: public, {key}")
    print("The public key of a client goes into the daemon's folder curve.clients, that of the daemon to each client,")
    print(f"as {own_folder() / 'server.key'} or wherever TACOD_CURVE_SERVER_KEY says.")
