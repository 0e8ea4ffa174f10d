"""Data sets, decoding and loading."""
