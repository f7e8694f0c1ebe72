"""The paper's experiments; `run.py` is the command."""
