"""ema_update: target <- momentum * target + (1 - momentum) * source over a whole list of tensors at
once."""

from .api import ema_update_

__all__ = ["ema_update_"]
