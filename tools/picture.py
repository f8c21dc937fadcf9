# SPDX-License-Identifier: Apache-2.0
"""Draw docs/request.svg: how a request runs through the server.

python -m tools.picture
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "docs/request.svg"
WIDTH, HEIGHT = 1000, 344
BOX_WIDTH, BOX_HEIGHT, GAP, LEFT, TOP = 178, 148, 22, 11, 52
INK, MUTED, BLUE, GREEN, PAPER = "#1f2328", "#59636e", "#dbeafe", "#dcfce7", "#ffffff"


@dataclass(frozen=True)
class Station:
    """A box of the picture."""

    title: str
    folder: str
    lines: tuple[str, ...]
    process: str
    colour: str = BLUE


STATIONS = (
    Station(
        "Request", "client", ("a prompt, and", 'model="sst2"', "(or the base model)"), "over HTTP or LLM(...)", PAPER
    ),
    Station(
        "Front end",
        "frontend/",
        ("finds the adapter, loads", "it into host memory,", "adds its hash and", "a cache salt"),
        "API process",
    ),
    Station(
        "Scheduler",
        "scheduler/",
        ("gives the request a row", "schedules its prompt in", "one step, or reuses a row", "that holds its vectors"),
        "engine core process",
    ),
    Station(
        "Worker",
        "worker/",
        ("copies the adapter into", "a slot on the device,", "maps every token", "to its row"),
        "one process per GPU",
    ),
    Station(
        "Layers",
        "layers/, ops/",
        ("prompt: the generator", "writes the row;", "all tokens: the row", "scales Q, V and Up"),
        "in the same process",
    ),
)
STEPS = (
    ("Step that reads the prompt", "the adapter's generators run once and write the row in every layer"),
    ("Every decode step", "no generator and no slot: the tokens of all adapters look up their rows"),
    ("Unchanged in vLLM", "attention, KV cache, weights, sampling"),
)


def text(x: float, y: float, content: str, size: int = 13, colour: str = INK, **attributes: str) -> str:
    """A line of text, centred at `x` unless `anchor` is given."""
    anchor = attributes.get("anchor", "middle")
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{attributes.get("weight", "400")}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A box with round corners."""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="8" fill="{colour}" stroke="{MUTED}"/>'


def draw() -> str:
    """The picture."""
    parts = [box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, PAPER)]
    parts.append(text(LEFT, 30, "How a request runs", 17, weight="600", anchor="start"))
    for number, station in enumerate(STATIONS):
        x = LEFT + number * (BOX_WIDTH + GAP)
        middle = x + BOX_WIDTH / 2
        parts.append(box(x, TOP, BOX_WIDTH, BOX_HEIGHT, station.colour))
        parts.append(text(middle, TOP + 24, station.title, 15, weight="600"))
        parts.append(text(middle, TOP + 42, station.folder, 12, MUTED))
        parts += [text(middle, TOP + 66 + 20 * row, line) for row, line in enumerate(station.lines)]
        parts.append(text(middle, TOP + BOX_HEIGHT + 18, station.process, 12, MUTED))
        if number:
            y = TOP + BOX_HEIGHT / 2
            parts.append(f'<path d="M{x - GAP + 1:g} {y:g}H{x - 3:g}" stroke="{INK}" marker-end="url(#arrow)"/>')
    top = TOP + BOX_HEIGHT + 34
    parts.append(box(LEFT, top, WIDTH - 2 * LEFT, 98, GREEN))
    for number, (name, said) in enumerate(STEPS):
        y = top + 28 + 26 * number
        parts.append(text(LEFT + 14, y, name, weight="600", anchor="start"))
        parts.append(text(LEFT + 238, y, said, anchor="start"))
    size = 'markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto"'
    arrow = f'<defs><marker id="arrow" {size}><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
    fonts = 'font-family="Helvetica, Arial, sans-serif"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {fonts}>'
    return "\n".join([head, arrow, *parts, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
