"""The overlap of a run as one small picture (SVG): a few chunks after the warm-up, one lane a stage. Pure.

It is plain SVG without scripts or fonts of its own, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from engine.measures import WARM_UP
from tpctl.errors import RunError
from tpctl.trace.bars import Bar, Kind
from tpctl.trace.run import Run

SHOWN = 4  # chunks
WIDTH, LEFT, RIGHT = 960, 86, 18
TOP, LANE, GAP, AXIS, LEGEND = 74, 34, 12, 34, 30
CHAR = 6.2  # of a bar's label, in pixels

# What a kind is called in the legend, and its class; kinds that look alike share one.
LOOKS: dict[Kind, tuple[str, str]] = {
    Kind.prepare: ("A: prepare", "a"),
    Kind.anchor: ("C: decode to the anchor", "n"),
    Kind.rest: ("C: decode the rest", "d"),
    Kind.decode: ("C: decode", "d"),
    Kind.queued: ("envelope waits", "w"),
    Kind.envelope: ("envelope", "e"),
    Kind.result: ("result", "r"),
    Kind.generate: ("B: generate", "b"),
}
STAGE0 = (Kind.prepare, Kind.anchor, Kind.rest, Kind.decode)
LINK = (Kind.queued, Kind.envelope, Kind.result)
IDLE = ("mesh idle", "i")

# Class: its colour on a light and on a dark page.
COLOURS = {
    "page": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9198a1"),
    "a": ("#8250df", "#a371f7"),
    "n": ("#bc4c00", "#f0883e"),
    "d": ("#eac54f", "#d29922"),
    "e": ("#116e76", "#39c5cf"),
    "w": ("#a9d8db", "#1f5f66"),
    "r": ("#3a9ea6", "#2a8f97"),
    "b": ("#0969da", "#4493f8"),
    "i": ("#afb8c1", "#565e67"),
    "in": ("#ffffff", "#0d1117"),
    "on": ("#1f2328", "#0d1117"),  # on a light bar
}
LIGHT = ("d", "w")
GRID = ("#d8dee4", "#30363d")


def _style() -> str:
    """Plain classes: some viewers know nothing of variables, and then see the light page."""
    pages = []
    for page in (0, 1):
        rules = "".join(f".{name}{{fill:{colours[page]}}}" for name, colours in COLOURS.items())
        pages.append(f"{rules}.g{{stroke:{GRID[page]}}}")
    return (
        "text{font:12px system-ui,-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif}"
        ".t{font-size:16px;font-weight:600}.mid{text-anchor:middle}.end{text-anchor:end}.in,.on{font-weight:600}"
        f"{pages[0]}@media(prefers-color-scheme:dark){{{pages[1]}}}"
    )


@dataclass(frozen=True)
class Window:
    """What is shown: `t0_ns` to `t1_ns`, chunks `first` to `last`."""

    t0_ns: int
    t1_ns: int
    first: int
    last: int


def picture(run: Run, title: str) -> str:
    """The file's text.

    Raises:
        RunError: too few chunks with times for a picture.
    """
    bars = [bar for bar in run.bars if bar.kind in LOOKS]
    leader = _leader(run)
    window = _window(bars, leader, run)
    lanes = [
        ("stage 0", [bar for bar in bars if bar.rank == 0 and bar.kind in STAGE0]),
        ("link", [bar for bar in bars if bar.rank == 0 and bar.kind in LINK]),
        ("mesh", [bar for bar in bars if bar.rank == leader and bar.kind is Kind.generate]),
    ]
    return "\n".join(_lines(run, title, window, lanes)) + "\n"


def _leader(run: Run) -> int:
    return next((line.rank for line in run.ranks if line.role == "stage1+leader"), 0)


def _window(bars: Sequence[Bar], leader: int, run: Run) -> Window:
    """From the phase A of the first chunk shown to the decode of the last."""
    made = sorted({bar.chunk_index for bar in bars if bar.rank == leader and bar.kind is Kind.generate})
    out = {bar.chunk_index for bar in bars if bar.rank == 0 and bar.kind in STAGE0}
    whole = [index for index in made if index in out]
    chosen = whole[WARM_UP : WARM_UP + SHOWN] or whole[-SHOWN:]
    if not chosen or len(whole) < 2:
        raise RunError(
            f"{run.run_dir} has {len(whole)} chunks whose times are known on rank 0 and on the mesh; "
            "a picture of their overlap needs two",
            code="TP-7803",
            where=str(run.run_dir),
            next_step=f"tpctl timeline {run.run_dir} --out timeline.json",
        )
    shown = [bar for bar in bars if bar.chunk_index in chosen]
    return Window(min(b.t0_ns for b in shown), max(b.t1_ns for b in shown), chosen[0], chosen[-1])


def _lines(run: Run, title: str, window: Window, lanes: Sequence[tuple[str, Sequence[Bar]]]) -> Iterator[str]:
    height = TOP + len(lanes) * (LANE + GAP) + AXIS + LEGEND
    facts = _facts(run, window, lanes)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-labelledby="title desc"><title id="title">{escape(title)}</title>'
        f'<desc id="desc">{escape(facts)}</desc><style>{_style()}</style>'
    )
    yield f'<rect width="{WIDTH}" height="{height}" class="page"/>'
    yield f'<text class="t ink" x="{LEFT}" y="26">{escape(title)}</text>'
    yield f'<text class="soft" x="{LEFT}" y="46">{escape(facts)}</text>'
    scale = (WIDTH - LEFT - RIGHT) / max(window.t1_ns - window.t0_ns, 1)
    bottom = TOP + len(lanes) * (LANE + GAP)
    yield from _axis(window, scale, bottom)
    seen: dict[str, str] = {}
    for number, (name, bars) in enumerate(lanes):
        y = TOP + number * (LANE + GAP)
        yield f'<text class="ink end" x="{LEFT - 10}" y="{y + LANE / 2 + 4:g}">{escape(name)}</text>'
        inside = [bar for bar in sorted(bars, key=lambda b: b.t0_ns) if bar.t1_ns > window.t0_ns]
        inside = [bar for bar in inside if bar.t0_ns < window.t1_ns]
        if name == "mesh":
            for before, after in itertools.pairwise(inside):
                if after.t0_ns > before.t1_ns:
                    seen[IDLE[1]] = IDLE[0]
                    yield _rect(before.t1_ns, after.t0_ns, window, scale, y + LANE / 2 - 3, 6, IDLE[1], IDLE[0])
        for bar in inside:
            words, look = LOOKS[bar.kind]
            seen[look] = "C: decode" if seen.get(look, words) != words else words
            about = f"{words}, chunk {bar.chunk_index}: {(bar.t1_ns - bar.t0_ns) / 1e6:.1f} ms"
            yield _rect(bar.t0_ns, bar.t1_ns, window, scale, y, LANE, look, about)
            yield from _number(bar, window, scale, y)
    yield from _legend(seen, bottom + AXIS)
    yield "</svg>"


def _facts(run: Run, window: Window, lanes: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    chunks = f"chunks {window.first} to {window.last}"
    if run.overlap is not None:
        found = run.overlap
        return (
            f"OverlapScore {found.score:.2f} · period {found.period_ms:.0f} ms · stage 0 {found.stage0_ms:.0f} ms · "
            f"stage 1 {found.stage1_ms:.0f} ms · mesh idle {found.mesh_idle_ms:.0f} ms · "
            f"medians of {found.chunks} chunks · shown: {chunks}"
        )
    ends = [bar.t1_ns for _, bars in lanes for bar in bars if bar.kind in (Kind.decode, Kind.rest)]
    steady = sorted(ends)[min(WARM_UP, max(len(ends) - 2, 0)) :]
    gaps = [(after - before) / 1e6 for before, after in itertools.pairwise(steady)]
    period = f"period {statistics.median(gaps):.0f} ms · " if gaps else ""
    return f"{period}no OverlapScore: the plan has one stage at a time, or too few chunks · shown: {chunks}"


def _axis(window: Window, scale: float, bottom: float) -> Iterator[str]:
    """Milliseconds since the first bar shown, in round steps."""
    span_ms = (window.t1_ns - window.t0_ns) / 1e6
    step = _round_up(span_ms / 10)
    digits = max(0, -math.floor(math.log10(step)))
    for number in range(int(span_ms / step) + 1):
        x = LEFT + number * step * 1e6 * scale
        yield f'<line class="g" x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{bottom}"/>'
        yield f'<text class="soft mid" x="{x:.1f}" y="{bottom + 16}">{number * step:.{digits}f}</text>'
    yield f'<text class="soft end" x="{LEFT - 10}" y="{bottom + 16}">ms</text>'


def _round_up(value: float) -> float:
    """The least of 1, 2, 5 x a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-6)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _span(t0_ns: int, t1_ns: int, window: Window, scale: float) -> tuple[float, float]:
    x0, x1 = (LEFT + (min(max(t, window.t0_ns), window.t1_ns) - window.t0_ns) * scale for t in (t0_ns, t1_ns))
    return x0, max(x1 - x0, 0.6)


def _rect(t0: int, t1: int, window: Window, scale: float, y: float, height: float, look: str, about: str) -> str:
    x, width = _span(t0, t1, window, scale)
    return (
        f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="2" class="{look}">'
        f"<title>{escape(about)}</title></rect>"
    )


def _number(bar: Bar, window: Window, scale: float, y: float) -> Iterator[str]:
    """The chunk's number, where it fits."""
    x, width = _span(bar.t0_ns, bar.t1_ns, window, scale)
    text = str(bar.chunk_index)
    if width >= CHAR * len(text) + 6:
        look = "on" if LOOKS[bar.kind][1] in LIGHT else "in"
        yield f'<text class="{look} mid" x="{x + width / 2:.1f}" y="{y + LANE / 2 + 4:g}">{text}</text>'


def _legend(seen: dict[str, str], y: float) -> Iterator[str]:
    x = float(LEFT)
    order = [look for _, look in LOOKS.values()] + [IDLE[1]]
    for look in dict.fromkeys(order):
        if look in seen:
            yield f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="2" class="{look}"/>'
            yield f'<text class="soft" x="{x + 17:.1f}" y="{y + 10}">{escape(seen[look])}</text>'
            x += 17 + CHAR * len(seen[look]) + 18
