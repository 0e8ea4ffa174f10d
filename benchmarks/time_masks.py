"""Draws who sees whom in masked_attention, from the times that `jepa_kernels.times` makes: one
panel for each usual mask."""

from __future__ import annotations

from benchmarks.svg import SOFT, Picture
from jepa_kernels import FrameTokens, frame_tokens

SEEN, HIDDEN, SPECIAL = "#2f6f9f", "#eef1f4", "#c9762b"
CELL, GAP, TOP, LEFT, EDGE = 14, 40, 78, 46, 60
GRID = (4, 1, 2)  # four frames of two patches
PLAIN = frame_tokens(GRID)
Panel = tuple[str, str, FrameTokens, int]
# Title, what it is, tokens, window (0: none).
PANELS: tuple[Panel, ...] = (
    ("frame-causal", "frame_tokens(grid)", PLAIN, 0),
    ("window of 2 frames", "window=2", PLAIN, 2),
    ("with an action a frame", "conditioning=1", frame_tokens(GRID, conditioning=1), 0),
    (
        "class token and register",
        "class_tokens=1, registers=1",
        frame_tokens(GRID, class_tokens=1, registers=1),
        0,
    ),
    (
        "last frame on a cache",
        "queries of frame 3",
        FrameTokens(PLAIN.query_ids, PLAIN.query_times[-2:], PLAIN.key_times),
        0,
    ),
)


def _side(tokens: FrameTokens) -> int:
    return len(tokens.key_times) * CELL


def picture() -> str:
    """The SVG."""
    width = LEFT + sum(_side(panel[2]) + GAP for panel in PANELS) - GAP + EDGE
    height = TOP + max(_side(panel[2]) for panel in PANELS) + 46
    drawn = Picture(
        width,
        height,
        "Who sees whom",
        "Five squares of queries (rows) by keys (columns). A cell is filled where the query sees "
        "the key: blocks below the diagonal for frame-causal, a band for a window, a full row and "
        "an empty column for a class token, a full column for a register, one row of blocks for a "
        "frame that is appended to a cache.",
    )
    left = LEFT
    for title, how, tokens, window in PANELS:
        drawn.text(left, TOP - 42, title, weight=600)
        drawn.text(left, TOP - 24, how, size=10, colour=SOFT, mono=True)
        _panel(drawn, left, tokens, window)
        left += _side(tokens) + GAP
    drawn.text(LEFT - 12, TOP + 10, "query", size=10, colour=SOFT, anchor="end")
    drawn.text(LEFT, TOP - 8, "key", size=10, colour=SOFT)
    drawn.text(
        LEFT,
        height - 18,
        "A query sees a key iff query_time - window < key_time <= query_time. Four frames of two "
        "patches; orange: actions, class tokens and registers.",
        size=11,
    )
    return drawn.source()


def _panel(drawn: Picture, left: int, tokens: FrameTokens, window: int) -> None:
    """Cells of queries by keys; those of tokens that are no patch in another colour."""
    ids = tokens.query_ids.tolist()
    special = [token < 0 or token in ids[i + 1 :] for i, token in enumerate(ids)]
    skipped = len(ids) - len(tokens.query_times)
    for i, query in enumerate(tokens.query_times.tolist()):
        for j, key in enumerate(tokens.key_times.tolist()):
            seen = key <= query and (not window or query - window < key)
            fill = (SPECIAL if special[skipped + i] or special[j] else SEEN) if seen else HIDDEN
            x, y = left + j * CELL, TOP + i * CELL
            drawn.box(x, y, CELL - 2, CELL - 2, fill=fill, radius=2)
