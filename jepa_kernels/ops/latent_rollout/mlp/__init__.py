"""Rollouts of a residual MLP."""
