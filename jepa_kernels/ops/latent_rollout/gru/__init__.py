"""Rollouts of a GRU."""
