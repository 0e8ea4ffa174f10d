"""latent_rollout: K steps of latent dynamics with gradients through time, rolled out in the hidden
space of the cell."""

from .api import HardRegion, latent_rollout, latent_rollout_loss
from .cells import GRU, Hamiltonian, ResidualMLP

__all__ = [
    "GRU",
    "Hamiltonian",
    "HardRegion",
    "ResidualMLP",
    "latent_rollout",
    "latent_rollout_loss",
]
