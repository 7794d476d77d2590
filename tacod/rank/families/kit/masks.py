"""Key masks of texts: which tokens others attend to."""

from __future__ import annotations

from tacod.rank.families.inputs import Inputs

__all__ = ["drop_hidden"]


def drop_hidden(inputs: Inputs, mask: str, *tokens: str, only_last: bool = False) -> Inputs:
    """The inputs without the tokens that a key mask [B, L] hides for every image; the mask goes if it then hides none.

    A token that no other attends to changes no image, so the result is the same, and attention needs no mask for it.

    Args:
        inputs: Of one forward.
        mask: The name of the mask, an `Argument` with ``keys``.
        tokens: The names of the arguments [B, L, ...] that it is for.
        only_last: Leave out no token before one that counts: where a token's position is its place in the text.
    """
    keys = inputs.get(mask)
    if keys is None:
        return inputs
    seen = keys.any(dim=0)
    if only_last:
        seen = seen.flip(0).cummax(0).values.flip(0)
    if not seen.any():
        return inputs
    dropped = {name: inputs[name][:, seen] for name in tokens}
    keys = keys[:, seen]
    return inputs.replace(**dropped, **{mask: None if keys.all() else keys})
