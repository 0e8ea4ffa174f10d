"""The patch embedding of visible tubelets as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import checks
from ..ops.visible_patch_embed import visible_patch_embed


class VisiblePatchEmbed(nn.Module):
    """`jepa_kernels.visible_patch_embed` with the weights of a Conv3d whose stride is its kernel.

    The convolution is `proj`, as in public ViT and V-JEPA code, so that a state dict of their patch
    embedding loads; of an I-JEPA's Conv2d take ``weight.unsqueeze(2)``. `from_conv` wraps one that
    is there.

    Args:
        channels: C, of a clip.
        width: D, of a token.
        tubelet: frames, rows and columns of pixels of a token.
        bias: whether there is one.
        mean, std: C numbers each, by which pixels are normalised; None is 0 and 1.
        scale: factor of a pixel ahead of them; None is 1/255 for uint8 clips and 1 for others.
        backend: a backend name, ``"auto"``, or None (see `jepa_kernels.backend`).

    Example:
        >>> import torch
        >>> from jepa_kernels.nn import VisiblePatchEmbed
        >>> embed = VisiblePatchEmbed(3, 32, (2, 16, 16))
        >>> clip = torch.rand(2, 3, 4, 64, 64)
        >>> embed(clip, torch.tensor([0, 3, 17, 30])).shape  # of a 2 x 4 x 4 grid
        torch.Size([2, 4, 32])
        >>> embed(clip[:, :, :1]).shape  # an image
        torch.Size([2, 16, 32])
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 768,
        tubelet: tuple[int, int, int] = (2, 16, 16),
        *,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, tubelet, tubelet, bias=bias)
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.scale, self.backend = scale, backend

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv3d,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> VisiblePatchEmbed:
        """A module that shares the parameters of `conv`.

        Raises:
            ValueError: `conv` is no patch embedding: stride and kernel differ, or it has padding,
                dilation or groups.
        """
        plain = (
            conv.stride == conv.kernel_size
            and conv.padding == (0, 0, 0)
            and conv.dilation == (1, 1, 1)
            and conv.groups == 1
        )
        if not plain:
            wanted = "have stride = kernel, and no padding, dilation or groups"
            raise ValueError(checks.sentence("VisiblePatchEmbed", "conv", wanted, conv))
        module = cls(1, 1, (1, 1, 1), mean=mean, std=std, scale=scale, backend=backend)
        module.proj = conv
        return module

    def forward(
        self,
        clip: torch.Tensor,
        ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings of the tokens `ids`, or of all.

        Args:
            clip: ``[B, C, frames, height, width]``. One frame is an image: it counts as a tubelet
                of equal frames, which is how public V-JEPA code embeds images.
            ids, cu_seqlens: as of `jepa_kernels.visible_patch_embed`, on the grid of tubelets.

        Returns:
            ``[B, N, D]``, or packed ``[tokens, D]``.
        """
        weight = self.proj.weight
        if clip.dim() == 5 and clip.shape[2] == 1:
            weight = weight.sum(2, keepdim=True)
        return visible_patch_embed(
            clip,
            weight,
            self.proj.bias,
            ids=ids,
            cu_seqlens=cu_seqlens,
            mean=self.mean,
            std=self.std,
            scale=self.scale,
            backend=self.backend,
        )
