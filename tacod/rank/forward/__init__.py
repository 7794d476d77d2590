"""One forward on all ranks."""
