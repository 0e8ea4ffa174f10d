"""latent_rollout: K steps of latent dynamics with gradients through time, rolled out in the hidden
space of the cell."""

from .api import latent_rollout, latent_rollout_loss
from .cells import GRU, Hamiltonian, ResidualMLP

__all__ = [
    "GRU",
    "Hamiltonian",
    "ResidualMLP",
    "latent_rollout",
    "latent_rollout_loss",
]
