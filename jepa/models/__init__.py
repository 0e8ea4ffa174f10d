"""Encoder and predictor of the V-JEPA family, packed and ragged throughout."""
