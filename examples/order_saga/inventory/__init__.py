"""Holds the stock."""
