"""FLOP of a rollout in state space and in hidden space, and the choice between them.

State space pays 2 * in * h to read the state and as much to write it, every step. Hidden space pays
h * h a step once the h x h coupling (W1 times the part of W2 that W1 reads) exists, and that
product is worth it only above some number of row-steps.
"""

from __future__ import annotations


def applications(cell: str, horizon: int) -> int:
    """How often the coupling moves the hidden state: between readings of it, so once less than the
    cell reads."""
    return (2 * horizon if cell == "hamiltonian" else horizon) - 1


def hidden_is_cheaper(cell: str, rows: int, in_channels: int, hidden: int, horizon: int) -> bool:
    """True where building the coupling costs less than applying its two factors one after the
    other."""
    inner = in_channels // 2 if cell == "hamiltonian" else in_channels
    build = inner * hidden * hidden
    per_application = rows * (2 * inner * hidden - hidden * hidden)
    return per_application * applications(cell, horizon) > build


def flop(
    cell: str,
    space: str,
    rows: int,
    channels: int,
    in_channels: int,
    hidden: tuple[int, ...],
    horizon: int,
    output: str,
) -> float:
    """FLOP (2 per multiply-add) of the matrix products of one forward pass."""
    width = hidden[0]
    if cell == "gru":
        return 2.0 * rows * horizon * 3 * channels * channels
    steps_read = 1 if output == "last" else horizon
    if cell == "residual_mlp":
        if space == "state":
            return 2.0 * rows * horizon * width * (in_channels + channels)
        coupling = width * width * (in_channels + rows * (horizon - 1)) if horizon > 1 else 0
        return 2.0 * (rows * in_channels * width + coupling + rows * steps_read * channels * width)
    half, energy = channels // 2, 2 * hidden[0] * hidden[1]
    if space == "state":
        return 2.0 * rows * horizon * 2 * (channels * width + energy + half * width)
    coupling = width * width * (half + rows * (2 * horizon - 1))
    return 2.0 * (
        rows * channels * width
        + coupling
        + rows * 2 * horizon * energy
        + rows * steps_read * channels * width
    )
