"""Examples, each of which runs."""
