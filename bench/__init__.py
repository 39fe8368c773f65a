"""Figures, each beside its control in one run."""
