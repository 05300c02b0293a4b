"""The charts of a report: loss over steps, histograms, recall over time.

Each chart comes as one SVG for wide pages and one for narrow pages. CSS shows the one that fits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from jobs.telemetry import plot_style
from jobs.telemetry.units import format_count, format_number

if TYPE_CHECKING:
    from jobs.telemetry.plot_style import Axes

Point = tuple[float, float]

_WIDTHS = {"wide": 1086, "narrow": 400}
"""CSS pixels: the column of the page on a desktop, and a phone."""
_MARGINS = {"left_margin": 54, "right_margin": 20, "top_margin": 40, "bottom_margin": 52}
_MOST_POINTS = {"wide": 600, "narrow": 250}
_LOGARITHMIC_FROM = 4.0
"""Greatest loss over least loss from which a linear axis would show only the first steps."""
_ONLY_POWERS_FROM = 1000.0
"""Greatest over least value from which a logarithmic axis has ticks only at powers of ten."""


def loss_curve(lines: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The training loss over the steps, raw and smoothed. None without a line that has both."""
    points = [(float(line["step"]), float(line["loss"])) for line in lines
              if isinstance(line.get("loss"), int | float) and math.isfinite(line["loss"])]
    if not points:
        return None
    smooth = smooth_curve(points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    logarithmic = low > 0 and high / low > _LOGARITHMIC_FROM

    def draw(size: str) -> str:
        figure = plot_style.new_figure(_WIDTHS[size], 390 if size == "wide" else 290)
        axes = plot_style.new_axes(figure, **_MARGINS)
        raw, mean = _keep_extremes(points, _MOST_POINTS[size]), _thin(smooth, _MOST_POINTS[size])
        axes.plot(*zip(*raw, strict=True), color=plot_style.COLORS["accent"], alpha=0.3, linewidth=1, gid="raw",
                  clip_on=False)
        axes.plot(*zip(*mean, strict=True), color=plot_style.COLORS["accent"], linewidth=2.25, gid="smooth",
                  clip_on=False, marker="o" if len(mean) == 1 else "")
        _linear(axes, "x", 0.0, max(points[-1][0], 1.0), grow=False, ticks=10 if size == "wide" else 4)
        if logarithmic:
            _logarithmic(axes, "y", low, high)
        else:
            # The axis includes zero if the loss varies much. Else the variation fills the plot.
            _linear(axes, "y", min(0.0, low) if low <= 0 or high / low > 2 else low, high, grow=True)
        axes.set_xlabel("step", labelpad=8)
        _name_y_axis(axes, "loss (logarithmic)" if logarithmic else "loss")
        return plot_style.to_svg(figure, f"loss over steps, from {format_number(smooth[0][1])} to "
                                 f"{format_number(smooth[-1][1])}", size)

    return _both_sizes(draw)


def histogram(counts: Sequence[int], low: float, high: float, name: str) -> Markup | None:
    """Bars for the counts of equal bins from `low` to `high`, without the empty bins at both ends.

    None if all bins are empty.
    """
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return None
    first, last = filled[0], filled[-1] + 1
    bin_width = (high - low) / len(counts)
    edges = [low + place * bin_width for place in range(first, last + 1)]
    titles = {f"bar-{place}": f"{edges[place]:.2f} to {edges[place + 1]:.2f}: {format_count(counts[first + place])}"
              for place in range(last - first)}

    def draw(size: str) -> str:
        figure = plot_style.new_figure(_WIDTHS[size], 178 if size == "wide" else 158)
        axes = plot_style.new_axes(figure, left_margin=10, right_margin=10, top_margin=4, bottom_margin=52)
        bars = axes.bar(edges[:-1], counts[first:last], 0.88 * bin_width, align="edge",
                        color=plot_style.COLORS["accent"], clip_on=False)
        for place, bar in enumerate(bars):
            bar.set(gid=f"bar-{place}", alpha=0.8, x=edges[place] + 0.06 * bin_width)
        _linear(axes, "x", edges[0], edges[-1], grow=False, ticks=10 if size == "wide" else 6)
        axes.set(ylim=(0, max(counts)), yticks=[])
        axes.set_xlabel(name, labelpad=8)
        return plot_style.to_svg(figure, f"{name}, from {edges[0]:.2f} to {edges[-1]:.2f}", size, titles)

    return _both_sizes(draw)


def recall_over_time(kinds: Mapping[str, Sequence[tuple[str, float, float]]]) -> Markup | None:
    """Recall over the milliseconds of a query, a line for each kind of query. None unless a kind has two points.

    The points of a kind are (parameter, milliseconds, recall). Time is on a logarithmic axis.
    """
    kinds = {kind: [point for point in points if point[1] > 0] for kind, points in kinds.items()}
    times = [time for points in kinds.values() for _, time, _ in points]
    recalls = [recall for points in kinds.values() for _, _, recall in points]
    if max(map(len, kinds.values()), default=0) < 2:
        return None
    titles = {f"dot-{row}-{place}": f"{parameter}: {recall:.3f} in {format_number(time)} ms"
              for row, points in enumerate(kinds.values()) for place, (parameter, time, recall) in enumerate(points)}
    # The labels belong to the upper line, because nothing is above it.
    top = max((points for points in kinds.values() if points), key=lambda points: points[-1][2])

    def draw(size: str) -> str:
        figure = plot_style.new_figure(_WIDTHS[size], 310 if size == "wide" else 290)
        axes = plot_style.new_axes(figure, **_MARGINS)
        for row, (kind, points) in enumerate(kinds.items()):
            color = plot_style.COLORS["held" if row % 2 else "accent"]
            axes.plot([time for _, time, _ in points], [recall for _, _, recall in points], color=color, linewidth=2,
                      gid=f"line-{row}", label=kind, clip_on=False)
            for place, (_, time, recall) in enumerate(points):
                axes.plot([time], [recall], "o", color=color, markersize=8, gid=f"dot-{row}-{place}", clip_on=False)
        _logarithmic(axes, "x", min(times), max(times))
        _linear(axes, "y", min(0.99, *recalls), 1.0, grow=True)
        for (parameter, time, recall), (x, y, align) in ((top[0], (10, -4, "left")), (top[-1], (12, 9, "right"))):
            axes.annotate(parameter, (time, recall), (x, y), textcoords="offset pixels", ha=align, gid="label",
                          color=plot_style.COLORS["quiet"])
        axes.set_xlabel("milliseconds per query (logarithmic)", labelpad=8)
        _name_y_axis(axes, "recall@10")
        figure.legend(loc="upper right", ncols=len(kinds), bbox_to_anchor=(1, 1), borderaxespad=0.3, borderpad=0,
                      handlelength=1.5, columnspacing=1.4)
        return plot_style.to_svg(figure, f"recall@10 over milliseconds per query, from {top[0][0]} to {top[-1][0]}",
                                 size, titles)

    return _both_sizes(draw)


def smooth_curve(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbors within a twenty-fifth of the curve before and after it."""
    reach = len(points) // 25
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for here, (x, _) in enumerate(points):
        # The window stays centered at the ends. Otherwise the curve would bend there.
        half = min(reach, here, len(points) - 1 - here)
        result.append((x, (sums[here + half + 1] - sums[here - half]) / (2 * half + 1)))
    return result


def _both_sizes(draw: Callable[[str], str]) -> Markup:
    with plot_style.plot_style():
        return Markup('<div class="chart">{}</div>').format(Markup("").join(Markup(draw(size)) for size in _WIDTHS))


def _thin(points: Sequence[Point], most: int) -> list[Point]:
    every = -(-len(points) // most)
    return [*points[:-1:every], points[-1]]


def _keep_extremes(points: Sequence[Point], most: int) -> list[Point]:
    """At most `2 * most` points: the least and the greatest of every stretch, so that every spike stays visible."""
    if len(points) <= 2 * most:
        return list(points)
    every = -(-len(points) // most)
    kept: list[Point] = []
    for start in range(0, len(points), every):
        part = points[start:start + every]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def _name_y_axis(axes: "Axes", name: str) -> None:
    """The name of the y axis, level, in the upper left corner of the figure."""
    axes.figure.text(0, 1, name, va="top", color=plot_style.COLORS["quiet"])


def _linear(axes: "Axes", name: Literal["x", "y"], low: float, high: float, *, grow: bool, ticks: int = 6) -> None:
    """Round ticks from `low` to `high`. With `grow`, the axis is extended to the next ticks."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    marks = plot_style.round_ticks(low, low + span, ticks)
    ends = (marks[0], marks[-1]) if grow else (low, low + span)
    shown = [mark for mark in marks if ends[0] - 1e-9 * span <= mark <= ends[1] + 1e-9 * span]
    plot_style.set_axis(axes, name, "linear", ends, shown, _tick_text)


def _logarithmic(axes: "Axes", name: Literal["x", "y"], low: float, high: float) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5, or at powers of ten alone, and at most a tick beyond each end."""
    factors = (1.0,) if high / low > _ONLY_POWERS_FROM else (1.0, 2.0, 5.0)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [factor * 10.0 ** power for power in powers for factor in factors]
    first = max(place for place, mark in enumerate(marks) if mark <= low * 1.0001)
    last = min(place for place, mark in enumerate(marks) if mark >= high * 0.9999)
    # The axis needs two ends, even if all values are equal.
    shown = marks[first:max(last, first + 1) + 1]
    plot_style.set_axis(axes, name, "log", (shown[0], shown[-1]), shown[::-(-len(shown) // 10)], _tick_text)


def _tick_text(value: float) -> str:
    return format_count(value) if abs(value) >= 1000 and value == int(value) else f"{value:.6g}"
