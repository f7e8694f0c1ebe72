"""How fast the package is, and what its exports lose: scripts that measure one thing each, or render the pages."""
