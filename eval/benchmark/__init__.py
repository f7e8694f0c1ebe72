"""Pools, scores and nested losses on data with known features; `run.py` is the command."""
