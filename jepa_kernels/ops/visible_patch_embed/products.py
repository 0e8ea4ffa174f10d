"""What backends share: forward and backward around the two products of a call, and both products by
blocks of rows.

With P the normalised pixels of the visible tubelets ``[rows, K]`` and W the weight ``[D, K]``:
    out = P W^T + bias,   dW = G^T P,   dbias = sum of G,   dP = G W,
and the gradient of a pixel is that of P, summed over the rows that show it, times its gain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from ...backend import Backend, Reason
from ..products import add_matmul, matmul, widened_on_cpus
from .inputs import Inputs
from .rows import rows_by_token, token_rows

# Bytes of a block of P: on a CPU it stays in the L2 and L3 caches, a GPU needs as much to be busy.
_BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**27}


class Products(Protocol):
    """What a backend computes of a call. `rows` are those of `rows.token_rows`."""

    def embed(self, inputs: Inputs, rows: torch.Tensor) -> torch.Tensor:
        """P W^T + bias, ``[rows, D]`` in the dtype of weight."""

    def weight_gradient(
        self, inputs: Inputs, rows: torch.Tensor, grad_out: torch.Tensor
    ) -> torch.Tensor:
        """G^T P, ``[D, K]`` in the accumulation dtype; grad_out contiguous ``[rows, D]``."""

    def clip_gradient(
        self, inputs: Inputs, of_pixels: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the clip, contiguous and in its dtype, from that of P, contiguous
        ``[rows, K]`` in the accumulation dtype; order and starts of `rows.rows_by_token`."""


def product_backend(
    name: str,
    devices: tuple[str, ...],
    unsupported: Callable[[Inputs], list[Reason]],
    products: Products,
    on: Callable[[torch.Tensor], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Backend:
    """A backend from its products.

    Args:
        name, devices, unsupported: as of `Backend`.
        products: see `Products`.
        on: what to enter around the products, given a tensor.
    """

    def forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        with on(inputs.clip):
            rows = token_rows(inputs)
            out = products.embed(inputs, rows)
        return out.view(*inputs.tokens_shape, inputs.width), rows

    def backward(
        inputs: Inputs, saved: list[torch.Tensor], grad_out: torch.Tensor, needs: list[bool]
    ) -> list[torch.Tensor | None]:
        grad_out, rows = grad_out.reshape(-1, inputs.width).contiguous(), saved[0]
        clip, weight, bias = None, None, None
        with on(inputs.clip):
            if needs[0]:
                of_pixels = matmul(grad_out, inputs.matrix(), inputs.dtype).contiguous()
                order, starts = rows_by_token(rows, inputs.batch * inputs.tokens)
                clip = products.clip_gradient(inputs, of_pixels, order, starts)
            if needs[1]:
                weight = products.weight_gradient(inputs, rows, grad_out)
                weight = weight.view(inputs.weight.shape).to(inputs.dtype)
            if needs[2]:
                bias = grad_out.sum(0, dtype=inputs.accumulate_dtype).to(inputs.dtype)
        return [clip, weight, bias]

    return Backend(name, devices, unsupported, forward, backward)


class Gathering(Protocol):
    """What a backend that leaves its products to torch does itself."""

    def gather(self, inputs: Inputs, rows: torch.Tensor, pixels: torch.Tensor) -> None:
        """Writes P of these rows to `pixels`, contiguous ``[rows, K]``, normalised in the
        accumulation dtype and rounded to that of `pixels`."""

    def clip_gradient(
        self, inputs: Inputs, of_pixels: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """See `Products`."""


class Blocks:
    """`Products` of blocks of gathered rows, each of which is multiplied while the caches hold
    it."""

    def __init__(self, gathering: Gathering) -> None:
        self.gathering = gathering
        self.clip_gradient = gathering.clip_gradient

    def embed(self, inputs: Inputs, rows: torch.Tensor) -> torch.Tensor:
        operand = _operand(inputs)
        weight = inputs.matrix().to(operand).mT
        bias = None if inputs.bias is None else inputs.bias.to(operand)
        out = inputs.weight.new_empty((inputs.count, inputs.width))
        for block, pixels in self._blocks(inputs, rows, operand):
            place = out[block]
            wide = place if operand == inputs.dtype else place.to(operand)
            if bias is None:
                torch.mm(pixels, weight, out=wide)
            else:
                torch.addmm(bias, pixels, weight, out=wide)
            if wide is not place:
                place.copy_(wide)
        return out

    def weight_gradient(
        self, inputs: Inputs, rows: torch.Tensor, grad_out: torch.Tensor
    ) -> torch.Tensor:
        operand = _operand(inputs)
        total: torch.Tensor | None = None
        for block, pixels in self._blocks(inputs, rows, operand):
            total = add_matmul(total, grad_out[block].mT, pixels, operand)
        if total is None:
            shape = (inputs.width, inputs.pixels)
            return inputs.weight.new_zeros(shape, dtype=inputs.accumulate_dtype)
        return total

    def _blocks(
        self, inputs: Inputs, rows: torch.Tensor, operand: torch.dtype
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        limit = _BLOCK_BYTES.get(inputs.device_type, _BLOCK_BYTES["cuda"])
        height = min(max(16, limit // (inputs.pixels * operand.itemsize)), inputs.count)
        memory = rows.new_empty((height, inputs.pixels), dtype=operand)
        for start in range(0, inputs.count, max(height, 1)):
            block = slice(start, min(start + height, inputs.count))
            pixels = memory[: block.stop - start]
            self.gathering.gather(inputs, rows[block], pixels)
            yield block, pixels


def _operand(inputs: Inputs) -> torch.dtype:
    """The dtype of products: float32 on a CPU that does not multiply the weight's."""
    widened = inputs.device_type == "cpu" and widened_on_cpus(inputs.dtype)
    return torch.float32 if widened else inputs.dtype
