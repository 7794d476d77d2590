"""Weights: files, names, patches."""
