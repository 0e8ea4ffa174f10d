"""A picture as SVG text: boxes, bars, lines and words on a white card."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

INK, SOFT, RULE = "#1f2933", "#5b6770", "#d5dbe1"
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"


@dataclass
class Picture:
    """Elements in drawing order.

    Attributes:
        width, height: in pixels.
        title, description: what a screen reader says.
    """

    width: int
    height: int
    title: str
    description: str
    elements: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 12,
        colour: str = INK,
        anchor: str = "start",
        weight: int = 400,
        mono: bool = False,
        name: str | None = None,
    ) -> None:
        """One line of words; `name` marks them as a dotted name in the code."""
        marked = f' data-name="{name}"' if name else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" '
            f'text-anchor="{anchor}" font-weight="{weight}" '
            f'font-family="{MONO if mono else FONT}"{marked}>{escape(words)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str,
        stroke: str = "none",
        radius: float = 6,
    ) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def line(
        self,
        points: list[tuple[float, float]],
        *,
        colour: str = SOFT,
        width: float = 1.4,
        arrow: bool = False,
        dashed: bool = False,
    ) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        extra = ' marker-end="url(#arrow)"' if arrow else ""
        extra += ' stroke-dasharray="4 3"' if dashed else ""
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" '
            f'stroke-width="{width:g}"{extra}/>'
        )

    def source(self) -> str:
        """The SVG file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<desc>{escape(self.description)}</desc>",
                '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{SOFT}"/>'
                "</marker></defs>",
                f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#ffffff"/>',
                *self.elements,
                "</svg>\n",
            ]
        )
