"""Counts what happens, and nobody knows that it is there."""
