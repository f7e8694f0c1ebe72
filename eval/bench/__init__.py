"""How fast the package is, and what its exports lose: each script measures one thing, `speed.py` renders the page."""
