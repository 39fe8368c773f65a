"""A trip booked with whoever answers first, paid last: a chain, an any-of join, a pivot, a deadline."""
