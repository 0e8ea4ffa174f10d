"""visible_patch_embed in eager PyTorch, by blocks of rows."""

from __future__ import annotations

import torch

from ...backend import ANY_DEVICE, Reason
from .inputs import Inputs
from .products import Blocks, product_backend


def unsupported(inputs: Inputs) -> list[Reason]:
    return []


class Eager:
    """See `products.Gathering`."""

    def gather(self, inputs: Inputs, rows: torch.Tensor, pixels: torch.Tensor) -> None:
        (frames, height, width), (depth, high, wide) = inputs.grid, inputs.tubelet
        clip = inputs.clip.unflatten(4, (width, wide)).unflatten(3, (height, high))
        view = clip.unflatten(2, (frames, depth)).permute(0, 2, 4, 6, 1, 3, 5, 7)
        step, site = _divided(rows, height * width)
        found = view[(*_divided(step, frames), *_divided(site, width))]
        gain, shift = inputs.normalisation[:, :, None, None, None]
        pixels.copy_(torch.addcmul(shift, found.to(shift.dtype), gain).flatten(1))

    def clip_gradient(
        self, inputs: Inputs, of_pixels: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        frames, height, width = inputs.grid
        total = inputs.batch * inputs.tokens
        token = torch.searchsorted(
            starts, torch.arange(len(order), device=order.device), right=True
        )
        gradient = of_pixels.new_zeros((total, inputs.pixels))
        gradient.index_add_(0, token - 1, of_pixels.index_select(0, order))
        cut = gradient.view(
            inputs.batch, frames, height, width, inputs.clip.shape[1], *inputs.tubelet
        )
        clip = cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(inputs.clip.shape)
        return (clip * inputs.normalisation[0, :, None, None, None]).to(inputs.clip.dtype)


def _divided(value: torch.Tensor, divisor: int) -> tuple[torch.Tensor, torch.Tensor]:
    quotient = torch.div(value, divisor, rounding_mode="floor")
    return quotient, value - quotient * divisor


BACKEND = product_backend("torch", ANY_DEVICE, unsupported, Blocks(Eager()))
