"""Sequence parallelism: who holds which tokens."""
