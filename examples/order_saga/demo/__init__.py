"""Runs the five services as real processes, kills one of them half way, and audits what is left."""
