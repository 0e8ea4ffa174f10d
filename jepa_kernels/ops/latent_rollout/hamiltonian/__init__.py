"""Rollouts of a Hamiltonian."""
