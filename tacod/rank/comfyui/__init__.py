"""Networks of the ComfyUI that the user has installed, run in the ranks where no family here has them.

ComfyUI is GPL-3.0. Its code stays in the user's folder; nothing of it is part of this package.
"""
