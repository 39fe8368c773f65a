"""Knows the customers and their points."""
