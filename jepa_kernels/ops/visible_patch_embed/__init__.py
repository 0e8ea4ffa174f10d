"""visible_patch_embed: the patch embedding of the tubelets that a mask leaves visible."""

from .api import visible_patch_embed

__all__ = ["visible_patch_embed"]
