"""CUDA C++ backend of visible_patch_embed: products whose pixels are gathered as they are
multiplied, on tensor cores for 16-bit weights.

Blocks of 64 rows by 64 channels; the weight gradient is a sum of pieces of the rows in a fixed
order.
"""

from __future__ import annotations

import torch

from ... import native
from ...backend import Reason
from . import native_ops
from .inputs import Inputs, gpu_reasons
from .products import product_backend


def unsupported(inputs: Inputs) -> list[Reason]:
    return native.cuda_unavailable_reasons(inputs.device_type) + gpu_reasons(inputs)


class Cuda:
    """See `products.Products`."""

    clip_gradient = staticmethod(native_ops.clip_gradient)

    def embed(self, inputs: Inputs, rows: torch.Tensor) -> torch.Tensor:
        bias = None if inputs.bias is None else inputs.bias.contiguous()
        given = (inputs.clip, rows, inputs.normalisation, inputs.weight, bias)
        out: torch.Tensor = native_ops.OPS.visible_patch_embed_embed(*given)
        return out

    def weight_gradient(
        self, inputs: Inputs, rows: torch.Tensor, grad_out: torch.Tensor
    ) -> torch.Tensor:
        given = (inputs.clip, rows, inputs.normalisation, grad_out, *inputs.tubelet)
        pieces: torch.Tensor = native_ops.OPS.visible_patch_embed_weight_gradient(*given)
        return pieces[0] if pieces.shape[0] == 1 else pieces.sum(0)


BACKEND = product_backend("cuda", ("cuda",), unsupported, Cuda())
