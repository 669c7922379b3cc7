"""The drawing board of the HTML report: SVG text whose colours are decided by the page's style sheet.

Matplotlib draws each figure once, in colours that occur nowhere else; in the SVG text they are then replaced by CSS
variables, so that one drawing serves light and dark. This is the only module that knows Matplotlib.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure as Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from onnxneutrino.formats import format_tick
from onnxneutrino.html_elements import printable
from onnxneutrino.html_style import PALETTE

COLOURS = {name: f"#5e1f{index:02x}" for index, name in enumerate(PALETTE)}
NAMES = {colour: name for name, colour in COLOURS.items()}
FONT, LONGEST_NAME = 12.0, 21
TAG = re.compile(r"<[^>]+>")
NUMBER = re.compile(r"-?\d+\.\d+")
REFERENCE = re.compile(r'(?:href="#|url\(#)([^")]+)')

Form = Callable[[float], str]


def draw(width: float, height: float, paint: Callable[[Figure], None], title: str, key: str) -> str:
    """Draw a figure as the text of an inline `<svg>`; the same input gives the same text.

    Args:
        width: in units of the drawing; text is 12 units high.
        height: likewise.
        paint: draws on the empty figure, in `COLOURS` only.
        title: what the drawing shows, read out in its place.
        key: begins every id of the drawing; of its own on a page.
    """
    file = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in letters that the layout's font lacks is shown by the browser, in a font of its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "onnxneutrino",
                "text.parse_math": False,
                "font.size": FONT,
                "axes.unicode_minus": True,
                "lines.solid_capstyle": "round",
                **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor"), COLOURS["muted"]),
                **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["line"]),
                "ytick.labelcolor": COLOURS["muted"],
                "grid.color": COLOURS["grid"],
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.facecolor": "none",
                "figure.facecolor": "none",
                "xtick.major.size": 0,
                "ytick.major.size": 0,
                "legend.frameon": False,
            }
        )
        drawn = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(drawn)
        drawn.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(file.getvalue(), width, height, title, key)


def _inline(svg: str, width: float, height: float, title: str, key: str) -> str:
    """The drawing as it stands in a page: no prolog, no style of its own, short numbers, ids that are its own."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    body = re.sub(r"<style[^>]*>[^<]*</style>", "", body, count=1)
    used = set(REFERENCE.findall(body))

    def tag(match: re.Match[str]) -> str:
        # Only tags are touched: what stands between them may be a name that looks like any of this.
        text = " ".join(match.group().split()).replace("xlink:href", "href")
        text = re.sub(r' id="([^"]+)"', lambda own: f' id="{key}-{own[1]}"' if own[1] in used else "", text)
        text = REFERENCE.sub(lambda own: own[0].replace(own[1], f"{key}-{own[1]}"), text)
        text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
        text = re.sub(r' transform="rotate\(-0 [^"]+"', "", text)
        text = re.sub(r"#5e1f[0-9a-f]{2}", lambda own: f"var(--{NAMES[own[0]]})", text)
        return NUMBER.sub(lambda own: f"{round(float(own[0]), 2) + 0.0:g}", text)

    body = re.sub(r">\s+<", "><", TAG.sub(tag, body))
    body = re.sub(r"<defs></defs>", "", body)
    told = html.escape(printable(title))
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{told}">'
    return f"{head}<title>{told}</title>{body}"


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits beside a drawing: its middle is left out where it is too long."""
    text = printable(" ".join(name.split()))
    if len(text) <= longest:
        return text
    head = (longest - 1) // 3
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (longest - 1 - head) :]}"


def ticked(axes: Axes, which: str, form: Form = format_tick, count: int = 5) -> None:
    """Give a linear axis (`x` or `y`) few round ticks, in words."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def log_ticked(axes: Axes, which: str, low: float, high: float, form: Form = format_tick) -> None:
    """Make an axis logarithmic from `low` to `high`, both positive, with ticks at 1, 2 and 5 or at powers of ten."""
    set_scale, set_limits, axis = (
        (axes.set_xscale, axes.set_xlim, axes.xaxis) if which == "x" else (axes.set_yscale, axes.set_ylim, axes.yaxis)
    )
    room = max(high / low, 1.05) ** 0.06
    low, high = low / room, high * room
    set_scale("log")
    set_limits(low, high)
    axis.set_ticks(log_steps(low, high))
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def log_steps(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from `low` to `high`, positive: 1, 2, 5 of each power of ten, fewer or more as the range asks."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = range(first, last + 1)
    for parts in ((1, 2, 5), (1,)):
        steps = [part * 10.0**power for power in every for part in parts if low <= part * 10.0**power <= high]
        if 3 <= len(steps) <= most:
            return steps
    if len(steps) > most:
        return steps[:: -(-len(steps) // most)]
    inner = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(step) for step in inner if low <= step <= high]


def guide(axes: Axes, value: float, words: str, which: str = "y", colour: str = "vermillion") -> None:
    """A dashed line at a value, named at its right or upper end."""
    line = axes.axhline if which == "y" else axes.axvline
    line(value, color=COLOURS[colour], linewidth=1.2, dashes=(4, 3), zorder=2)
    across = which == "y"
    axes.annotate(
        words,
        (1, value) if across else (value, 1),
        xycoords=("axes fraction", "data") if across else ("data", "axes fraction"),
        xytext=(-2, 3) if across else (4, -2),
        textcoords="offset points",
        ha="right" if across else "left",
        va="bottom" if across else "top",
        color=COLOURS["ink"],
        fontsize=FONT - 1,
        zorder=5,
    )


def cells(axes: Axes, squares: Sequence[tuple[int, int, str, float]]) -> None:
    """Fill unit squares: column, row, colour and opacity of each."""
    for column, row, colour, opacity in squares:
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=COLOURS[colour], edgecolor="none", alpha=opacity))
