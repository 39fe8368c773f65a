"""The rules of `saga check`, by subject. Each reads a `Flow` and yields what it finds."""
