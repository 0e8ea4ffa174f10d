"""sliced_gaussianity: how far random one-dimensional projections are from a normal distribution."""

from .api import sliced_gaussianity
from .directions import random_directions

__all__ = ["random_directions", "sliced_gaussianity"]
