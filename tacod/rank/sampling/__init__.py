"""Sampling runs in the ranks."""
