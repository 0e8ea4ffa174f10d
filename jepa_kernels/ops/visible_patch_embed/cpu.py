"""C++ CPU backend of visible_patch_embed, products through torch.

Threads gather and normalise rows of pixels into a block that the caches hold while it is
multiplied; the block's memory serves the whole call.
"""

from __future__ import annotations

import torch

from ... import native
from ...backend import Reason
from . import native_ops
from .inputs import Inputs, kernel_reasons
from .products import Blocks, product_backend


def unsupported(inputs: Inputs) -> list[Reason]:
    return native.cpu_unavailable_reasons(inputs.device_type) + kernel_reasons(inputs)


class Native:
    """See `products.Gathering`."""

    clip_gradient = staticmethod(native_ops.clip_gradient)

    def gather(self, inputs: Inputs, rows: torch.Tensor, pixels: torch.Tensor) -> None:
        arguments = (inputs.clip, rows, inputs.normalisation, *inputs.tubelet, native.isa())
        native_ops.OPS.visible_patch_embed_gather_(pixels, *arguments)


BACKEND = product_backend("cpu", ("cpu",), unsupported, Blocks(Native()))
