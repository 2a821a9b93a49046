"""Checkpoints of the papers' codes: their names, reading and writing them."""
