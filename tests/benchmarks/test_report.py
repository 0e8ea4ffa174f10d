"""The page: self-contained, complete, escaped; renders in a headless browser without an error and
sorts; two sweeps compare."""

from __future__ import annotations

import copy
import csv
import html
import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    report,
    report_compare,
    report_figures,
    report_page,
    report_text,
    sweep_record,
)
from tests.conftest import missing

RECORD = Path(__file__).with_name("sweep_sample.json")
VOID = {"meta", "link", "br", "input", "path", "use", "rect", "line"}


@pytest.fixture(scope="module")
def record() -> dict:
    """A small committed sweep, so that the page can be tested without measuring."""
    return sweep_record.load(RECORD)


@pytest.fixture(scope="module")
def page(record: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(record, tmp_path_factory.mktemp("page") / "sweep.html", source=RECORD)


class Tags(HTMLParser):
    """Collects references and checks that tags balance."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value:
                self.references.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack and self.stack.pop() == tag, tag


def test_page_is_self_contained_and_well_formed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert not tags.stack
    assert len(tags.ids) == len(set(tags.ids)), "two elements share an id"
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text), (
        "the page must need no network"
    )
    assert "url(http" not in text and "@import" not in text and "NaN" not in text
    for name in tags.references:
        target = name.split("#")[0]
        assert (
            name.startswith(("#", "data:"))
            or (page.parent / target).exists()
            or target.endswith("sweep_sample.json")
        ), name
    for marker in ("prefers-color-scheme: dark", "max-width: 640px", 'name="viewport"'):
        assert marker in text


def test_every_figure_is_there_twice_and_as_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in report_figures.FIGURES:
        assert f'id="figure-{name}"' in text
        for suffix in ("png", "svg"):
            assert (page.parent / f"sweep_{name}.{suffix}").stat().st_size > 3000
    assert text.count("<svg ") == 2 * len(report_figures.FIGURES)


def test_inline_figures_take_their_colours_from_the_theme(record: dict) -> None:
    for name, (draw, _) in report_figures.FIGURES.items():
        svg = report_figures.inline_svg(draw(record), name)
        left = set(re.findall(r"(?:fill|stroke): (#[0-9a-fA-F]{6})", svg))
        assert not left, f"{name} keeps fixed colours {left}"
        assert "<text" in svg, "text must stay text"


def test_csv_has_every_cell(record: dict, page: Path) -> None:
    with open(page.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["cells"])
    for row, cell in zip(rows, record["cells"], strict=True):
        assert row["variant"] == cell["variant"] and row["status"] == cell["status"]
        if cell["status"] == "ok":
            assert float(row["step_ms"]) == pytest.approx(cell["step_ms"])


def test_sentences_come_from_the_cells(record: dict) -> None:
    sentences = report_text.findings(record)
    assert len(sentences) >= 4
    last = record["sizes"][-1]["resolution"]
    cell = sweep_record.find(
        record["cells"], mode="pretrain", variant="baseline", resolution=last, backend="auto"
    )
    assert f"{cell['clips_per_s']:.3g} clips/s" in sentences[0]
    assert f"{cell['speedup']:.2f}x" in sentences[3]


def test_one_resolution_is_not_compared_with_itself(record: dict) -> None:
    alone = copy.deepcopy(record)
    alone["sizes"] = alone["sizes"][-1:]
    name = alone["sizes"][0]["resolution"]
    cell = sweep_record.find(
        alone["cells"], mode="pretrain", variant="baseline", resolution=name, backend="auto"
    )
    sentences = report_text.findings(alone)
    assert sentences[0].startswith(
        f"At {name} px pre-training (baseline) runs at {cell['clips_per_s']:.3g} clips/s"
    )
    assert not any(
        f"{name} px and" in sentence or f"to {name} px" in sentence for sentence in sentences
    )


def test_text_from_outside_is_escaped(record: dict) -> None:
    hostile = copy.deepcopy(record)
    hostile["command"] = "python <script>alert(1)</script> & 'x'"
    hostile["left_out"] = [{"resolution": "<b>", "tokens": 1, "reason": "<img src=x>"}]
    text = report_page.render(hostile, {"a<b": 'c"d'}, [])
    assert "<script>alert" not in text and "<img src=x>" not in text and "a&lt;b" in text


def test_missing_cells_show_their_reason(record: dict) -> None:
    broken = copy.deepcopy(record)
    cell = broken["cells"][0]
    for name in [
        name
        for name in cell
        if name
        not in ("mode", "variant", "backend", "resolution", "tokens", "pixels", "frames", "batch")
    ]:
        del cell[name]
    cell |= {"status": "out of memory", "reason": "needs 99 GB"}
    text = report_page.render(broken, {}, [])
    assert "out of memory" in text and "needs 99 GB" in text


def test_comparison_tells_change_from_noise(record: dict) -> None:
    after = copy.deepcopy(record)
    slower, faster, noisy = after["cells"][:3]
    for cell, factor in ((slower, 3.0), (faster, 0.3), (noisy, 1.0001)):
        cell["step_ms"] *= factor
        cell["interval_ms"] = [value * factor for value in cell["interval_ms"]]
    gone = after["cells"].pop()
    rows = report_compare.compare(record, after)
    verdicts = {tuple(row[name] for name in report_compare.KEY): row["verdict"] for row in rows}
    key = {
        id(cell): tuple(cell[name] for name in report_compare.KEY)
        for cell in (slower, faster, noisy, gone)
    }
    assert [verdicts[key[id(cell)]] for cell in (slower, faster, noisy, gone)] == [
        "slower",
        "faster",
        "within noise",
        "only before",
    ]
    assert rows[0]["verdict"] == "slower" and "1 slower" in report_compare.text(rows)
    tally = report_compare.counts(rows)
    assert sum(tally.values()) == len(rows) == len(record["cells"])


def test_comparison_needs_a_common_cell(record: dict) -> None:
    other = copy.deepcopy(record)
    for cell in other["cells"]:
        cell["batch"] = 64
    with pytest.raises(ValueError, match="share at least one cell"):
        report_compare.compare(record, other)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "compare.html"
    assert report.main([str(RECORD), str(RECORD), "--output", str(page)]) == 0
    assert "within noise" in capsys.readouterr().out and "Two sweeps compared" in page.read_text(
        encoding="utf-8"
    )
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert report.main([str(RECORD)] * 3) == 2


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
    "--virtual-time-budget=4000",
)
PROBE = """<script>
const failures = [];
window.addEventListener("error", (event) => failures.push(event.message));
window.addEventListener("unhandledrejection", (event) => failures.push(String(event.reason)));
const consoleError = console.error;
console.error = (...values) => { failures.push(values.join(" ")); consoleError(...values); };
window.addEventListener("load", () => setTimeout(() => {
  const say = (name, value) => { document.body.dataset[name] = JSON.stringify(value); };
  const table = document.getElementById("overheads");
  const column = (n) => Array.from(table.tBodies[0].rows).map((row) => row.cells[n].dataset.sort);
  const press = (n) => table.tHead.rows[0].cells[n].querySelector("button").click();
  press(0); say("byName", column(0)); press(0); say("byNameAgain", column(0)); press(1); say("byMilliseconds", column(1).map(Number));
  say("marked", Array.from(table.tHead.rows[0].cells).map((cell) => cell.getAttribute("aria-sort")));
  const shown = () => Array.from(document.querySelectorAll("#cells tbody tr")).filter((row) => !row.hidden).length;
  say("filtered", shown());
  for (const choice of document.querySelectorAll("form.filters select")) { choice.value = ""; }
  document.querySelector("form.filters").dispatchEvent(new Event("change")); say("unfiltered", shown());
  const size = (box) => box.getBoundingClientRect();
  const visible = (kind) => Array.from(document.querySelectorAll(".figure ." + kind)).filter((box) => size(box).width > 0);
  say("wide", visible("wide").length); say("narrow", visible("narrow").length);
  say("drawn", Array.from(document.querySelectorAll(".figure svg")).filter((svg) => size(svg).height > 100).length);
  say("overflow", document.documentElement.scrollWidth - document.documentElement.clientWidth);
  say("failures", failures);
}, 50));
</script>"""


def probed(page: Path) -> Path:
    """The page with the probe in its head."""
    path = page.with_name("probed.html")
    path.write_text(
        page.read_text(encoding="utf-8").replace("<head>", "<head>" + PROBE, 1), encoding="utf-8"
    )
    return path


def browse(page: Path, width: int) -> dict[str, Any]:
    """What the probe wrote on the body, in a headless browser of the given width."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        missing(f"none of {', '.join(BROWSERS)} is installed, so the page cannot be rendered")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={width},900",
            "--dump-dom",
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    body = re.search(r"<body([^>]*)>", done.stdout).group(1)
    return {
        name: json.loads(html.unescape(value))
        for name, value in re.findall(r'data-([a-z-]+)="([^"]*)"', body)
    }


def test_page_in_a_browser(record: dict, page: Path) -> None:
    seen = browse(probed(page), 1200)
    assert seen["failures"] == []
    assert seen["by-name"] == sorted(seen["by-name"]) and len(seen["by-name"]) >= 2
    assert seen["by-name-again"] == seen["by-name"][::-1]
    assert seen["by-milliseconds"] == sorted(seen["by-milliseconds"], reverse=True)
    assert seen["marked"][:2] == [None, "descending"]
    assert 0 < seen["filtered"] < seen["unfiltered"] == len(record["cells"])
    count = len(report_figures.FIGURES)
    assert (seen["wide"], seen["narrow"], seen["drawn"]) == (count, 0, count)
    assert seen["overflow"] <= 0


def test_page_on_a_phone(page: Path) -> None:
    # Headless Chromium has a least window width of 500; a frame of 390 pixels inside it is a phone.
    frame = page.with_name("phone.html")
    frame.write_text(
        f'<!DOCTYPE html><body><iframe id="f" src="{probed(page).name}" width="390" '
        'height="800"></iframe><script>'
        'window.addEventListener("load", () => setTimeout(() => { const inside = '
        'document.getElementById("f").contentDocument.body.dataset;'
        "for (const name in inside) document.body.dataset[name] = inside[name]; }, "
        "400));</script></body>",
        encoding="utf-8",
    )
    seen = browse(frame, 600)
    count = len(report_figures.FIGURES)
    assert seen["failures"] == []
    assert (seen["wide"], seen["narrow"], seen["drawn"]) == (0, count, count)
    assert seen["overflow"] <= 0, "the page must not scroll sideways on a phone"
