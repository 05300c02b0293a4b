"""One style for all plots: figures with the colors of the report, as inline SVG or as PNG.

The only file that imports matplotlib. It does so inside of functions, because the import takes half a second that most
commands do not need.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

# The light values of the variables of the same names in report.css.
COLORS = {"paper": "#ffffff", "ink": "#1d2129", "quiet": "#667080", "line": "#e3e6eb", "accent": "#2a6292",
          "good": "#2f7d4f", "warn": "#a4610f", "bad": "#b3382c", "held": "#7a4a9e"}
SERIES = tuple(COLORS[name] for name in ("accent", "warn", "good", "held", "bad"))
_PIXELS_PER_INCH = 72
"""The SVG backend writes points. With 72 to the inch, one point is one CSS pixel."""
_FONT_PIXELS = 12.5
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def plot_style() -> Iterator[None]:
    """Make and save figures inside of this context. It ignores a user's matplotlibrc and restores it at the end."""
    import matplotlib
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: dict[Any, Any] = {
            "svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "DejaVu Sans", "font.size": _FONT_PIXELS,
            "figure.dpi": _PIXELS_PER_INCH, "figure.facecolor": COLORS["paper"], "text.color": COLORS["ink"],
            "axes.facecolor": "none", "axes.edgecolor": COLORS["line"], "axes.labelcolor": COLORS["quiet"],
            "axes.titlesize": _FONT_PIXELS, "axes.titlecolor": COLORS["ink"], "axes.titlepad": 9.0,
            "axes.axisbelow": True, "axes.xmargin": 0.0, "axes.ymargin": 0.0, "grid.color": COLORS["line"],
            "grid.linewidth": 1.0, "xtick.labelcolor": COLORS["quiet"], "ytick.labelcolor": COLORS["quiet"],
            "xtick.major.pad": 8.0, "ytick.major.pad": 8.0, "legend.frameon": False,
            "legend.labelcolor": COLORS["quiet"], **{f"axes.spines.{side}": False for side in ("left", "top", "right")},
            **{f"{axis}tick.{name}": False for axis, name in (("x", "bottom"), ("y", "left"), ("x", "minor.bottom"),
                                                              ("y", "minor.left"))}}
        matplotlib.rcParams.update(settings)
        yield


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> "Figure":
    """A figure of `width` by `height` CSS pixels, independent of pyplot."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), layout=layout)


def new_axes(figure: "Figure", left_margin: float, right_margin: float, top_margin: float, bottom_margin: float
             ) -> "Axes":
    """Axes with margins in CSS pixels and horizontal grid lines. Nothing is clipped: data must be within the limits."""
    width, height = figure.get_size_inches() * _PIXELS_PER_INCH
    axes = figure.add_axes((left_margin / width, bottom_margin / height, (width - left_margin - right_margin) / width,
                            (height - top_margin - bottom_margin) / height))
    axes.patch.set_gid("frame")
    axes.grid(axis="y", clip_on=False)
    return axes


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers from below `low` to above `high`, ascending."""
    from matplotlib.ticker import MaxNLocator
    return [float(mark) for mark in MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)]


def set_axis(axes: "Axes", name: Literal["x", "y"], scale: Literal["linear", "log"], ends: tuple[float, float],
             ticks: Sequence[float], tick_text: Callable[[float], str]) -> None:
    """Fix the scale, the ends and the ticks of an axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    axes.set(**{f"{name}scale": scale, f"{name}lim": ends})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def to_svg(figure: "Figure", label: str, css_class: str, titles: Mapping[str, str] | None = None) -> str:
    """The figure as an SVG element for use inside HTML. Equal figures give equal bytes.

    Colors become CSS variables, so the plot follows the light or dark page. The gid of an artist, without what follows
    a hyphen, becomes its class. `titles` has the tooltip of each gid.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True,
                   metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    targets = {element.get(_HREF, "")[1:] for element in root.iter()}
    for parent in root.iter():
        for child in list(parent):
            if child.tag in {f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"}:
                parent.remove(child)
    for element in list(root.iter()):
        _simplify(element, targets, titles or {})
    root.attrib = {"viewBox": root.get("viewBox", ""), "class": css_class, "role": "img", "aria-label": label}
    text = ElementTree.tostring(root, encoding="unicode")
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    # Inside HTML the elements of an SVG need no namespace.
    return re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<)ns0:|(?<=</)ns0:', "", text)


def _simplify(element: ElementTree.Element, targets: set[str], titles: Mapping[str, str]) -> None:
    """Shorten one element: no unused id, the text style left to CSS, a tenth of a pixel in paths."""
    name = element.attrib.pop("id", "")
    if name in targets:
        element.set("id", name)
    elif name and not re.fullmatch(r"\w+_\d+", name):
        element.set("class", name.partition("-")[0])
    if name in titles:
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = titles[name]
        element.insert(0, title)
    if href := element.attrib.pop(_HREF, ""):
        element.set("href", href)
    if "d" in element.attrib:
        element.set("d", " ".join(re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}",
                                         element.get("d", "")).split()))
    if element.tag == f"{{{_SVG}}}text":
        rules = [rule.strip() for rule in element.get("style", "").split(";")]
        element.set("style", "; ".join(rule for rule in rules if rule and not rule.startswith("font")))


def save_png(figure: "Figure", path: Path, pixels_per_css_pixel: float) -> None:
    """Save the figure as a PNG on white paper. Equal figures give equal bytes."""
    figure.savefig(path, format="png", dpi=_PIXELS_PER_INCH * pixels_per_css_pixel, metadata={"Software": None})
