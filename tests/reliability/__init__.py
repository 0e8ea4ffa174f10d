"""Mutated inputs and killed runs: `python -m tests.reliability` writes the record."""
