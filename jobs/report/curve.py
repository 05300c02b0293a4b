"""Curves and bars as vectors that stretch with the page while their letters keep their size."""

import math
from collections.abc import Sequence
from typing import Any

from jobs.report.page import Html, brief, number, tag, together

_POINTS = 600
_STEEP = 4.0
"""Where the loss falls by more than this factor, a linear axis would show only the beginning."""

Point = tuple[float, float]


def curve(lines: Sequence[dict[str, Any]]) -> Html | None:
    """The loss over the steps: as it was, faint, and smoothed; None without a line that has both."""
    points = [(float(line["step"]), float(line["loss"])) for line in lines
              if isinstance(line.get("loss"), int | float) and math.isfinite(line["loss"])]
    if not points:
        return None
    smooth = _thinned(smoothed(points))
    raw = _extremes(points)
    logarithmic = _STEEP < _range(raw) < math.inf
    steps = _ticks(0.0, points[-1][0])
    least, most = min(y for _, y in raw), max(y for _, y in raw)
    losses = _decades(least, most) if logarithmic else _ticks(min(0.0, least) if _range(raw) > 2 else least, most)
    low, high = losses[0], losses[-1]
    right = max(points[-1][0], steps[-1], 1.0)

    def place(point: Point) -> Point:
        """Hundredths of the plot from its left and from its top."""
        x, y = point
        if logarithmic:
            low_, high_, y = math.log(low), math.log(high), math.log(y)
        else:
            low_, high_ = low, high
        return 100 * x / right, 100 - 100 * (y - low_) / (high_ - low_)

    grid = [tag("line", x1=0, x2=100, y1=f"{place((0, loss))[1]:.2f}", y2=f"{place((0, loss))[1]:.2f}")
            for loss in losses]
    label = f"loss over steps, from {brief(smooth[0][1])} to {brief(smooth[-1][1])}"
    drawing = tag("svg", grid, _path([place(point) for point in raw], "raw"),
                  _path([place(point) for point in smooth], "smooth"), viewBox="0 0 100 100",
                  preserveAspectRatio="none", role="img", aria_label=label)
    words = [tag("span", number(step), class_="x", style=f"left:{place((step, low))[0]:.2f}%") for step in steps]
    words += [tag("span", _short(loss), class_="y", style=f"top:{place((0, loss))[1]:.2f}%") for loss in losses]
    words += [tag("span", "step", class_="x-name"),
              tag("span", "loss, logarithmic" if logarithmic else "loss", class_="y-name")]
    return tag("div", drawing, together(words), class_="plot")


def bars(counts: Sequence[int], low: float, high: float, name: str) -> Html | None:
    """How many values fell into each of equal bins from `low` to `high`; bins beyond the first and last are left out.

    None if there are no values.
    """
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return None
    first, last = filled[0], filled[-1] + 1
    width = (high - low) / len(counts)
    left, right = low + first * width, low + last * width
    most = max(counts)
    step = 100 / (last - first)
    boxes = [tag("rect", x=f"{(place - first) * step + step * .06:.2f}", width=f"{step * .88:.2f}",
                 y=f"{100 - 100 * counts[place] / most:.2f}", height=f"{100 * counts[place] / most:.2f}")
             for place in range(first, last)]
    drawing = tag("svg", boxes, tag("line", x1=0, x2=100, y1=100, y2=100), viewBox="0 0 100 100",
                  preserveAspectRatio="none", role="img", aria_label=f"{name}, from {left:.2f} to {right:.2f}")
    marks = [mark for mark in _ticks(left, right) if left - 1e-9 <= mark <= right + 1e-9]
    words = [tag("span", _short(mark), class_="x", style=f"left:{100 * (mark - left) / (right - left):.2f}%")
             for mark in marks]
    words.append(tag("span", name, class_="x-name"))
    return tag("div", drawing, together(words), class_="plot low")


def trade_off(kinds: dict[str, Sequence[tuple[str, float, float]]]) -> Html | None:
    """Recall over the milliseconds of a query, a line for each kind of query; None unless one has two points.

    The points of a kind are (parameter, milliseconds, recall); milliseconds are drawn on a logarithmic axis.
    """
    kinds = {kind: [point for point in points if point[1] > 0] for kind, points in kinds.items()}
    every = [point for points in kinds.values() for point in points]
    if max(map(len, kinds.values()), default=0) < 2:
        return None
    # A little more than there is: where all are equal an axis needs two ends.
    times = _decades(0.99 * min(time for _, time, _ in every), 1.01 * max(time for _, time, _ in every))
    recalls = [mark for mark in _ticks(min(0.99, *(recall for _, _, recall in every)), 1.0) if mark <= 1.0 + 1e-9]

    def place(time: float, recall: float) -> Point:
        """Hundredths of the plot from its left and from its top."""
        return (100 * math.log(time / times[0]) / math.log(times[-1] / times[0]),
                100 - 100 * (recall - recalls[0]) / (recalls[-1] - recalls[0]))

    marks: list[Html] = [tag("line", x1=0, x2=100, y1=f"{y:.2f}", y2=f"{y:.2f}")
                         for y in (place(times[0], recall)[1] for recall in recalls)]
    for number_, points in enumerate(kinds.values()):
        marks.append(_path([place(time, recall) for _, time, recall in points], f"kind{number_}"))
        for parameter, time, recall in points:
            x, y = (f"{value:.2f}" for value in place(time, recall))
            # Without length, and with round ends: a dot that the stretching does not bend.
            marks.append(tag("path", tag("title", f"{parameter}: {recall:.3f} in {brief(time)} ms"), d=f"M{x},{y}h0",
                             class_=f"dot kind{number_}"))
    words = [tag("span", _short(time), class_="x", style=f"left:{place(time, recalls[0])[0]:.2f}%") for time in times]
    words += [tag("span", _short(recall), class_="y", style=f"top:{place(times[0], recall)[1]:.2f}%")
              for recall in recalls]
    longest = max(kinds.values(), key=len)
    for side, (parameter, time, recall) in (("first", longest[0]), ("last", longest[-1])):
        x, y = place(time, recall)
        words.append(tag("span", parameter, class_=f"at {side}", style=f"left:{x:.2f}%;top:{y:.2f}%"))
    words += [tag("span", "milliseconds a query, logarithmic", class_="x-name"),
              tag("span", "recall@10", class_="y-name")]
    drawing = tag("svg", marks, viewBox="0 0 100 100", preserveAspectRatio="none", role="img",
                  aria_label=f"recall@10 over milliseconds a query, from {longest[0][0]} to {longest[-1][0]}")
    key = tag("p", (tag("span", kind, class_=f"kind{number_}") for number_, kind in enumerate(kinds)), class_="key")
    return together([key, tag("div", drawing, together(words), class_="plot tuning")])


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and those within a twenty-fifth of the curve before and after it."""
    reach = len(points) // 25
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for here, (x, _) in enumerate(points):
        # The window stays centred at the ends, or the curve would bend there.
        half = min(reach, here, len(points) - 1 - here)
        result.append((x, (sums[here + half + 1] - sums[here - half]) / (2 * half + 1)))
    return result


def _thinned(points: Sequence[Point]) -> list[Point]:
    every = -(-len(points) // _POINTS)
    return [*points[:-1:every], points[-1]]


def _extremes(points: Sequence[Point]) -> list[Point]:
    """Fewer points that keep the least and the greatest of every stretch: no spike goes unseen."""
    if len(points) <= 2 * _POINTS:
        return list(points)
    every = -(-len(points) // _POINTS)
    found = []
    for start in range(0, len(points), every):
        part = points[start:start + every]
        found += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return found


def _path(points: Sequence[Point], kind: str) -> Html:
    return tag("polyline", points=" ".join(f"{x:.2f},{y:.2f}" for x, y in points), class_=kind)


def _range(points: Sequence[Point]) -> float:
    """The greatest over the least, without end where that is none."""
    low = min(y for _, y in points)
    return max(y for _, y in points) / low if low > 0 else math.inf


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about six."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [count * step for count in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5 and their powers of ten around `low` and `high`."""
    marks = [factor * 10.0 ** power for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
             for factor in (1, 2, 5)]
    first = max(place for place, mark in enumerate(marks) if mark <= low * 1.0001)
    last = min(place for place, mark in enumerate(marks) if mark >= high * 0.9999)
    chosen = marks[first:last + 1]
    # Over many powers of ten the tens alone; the ends stay, for the curve must lie between them.
    return chosen if len(chosen) <= 9 else [mark for mark in chosen if mark in (chosen[0], chosen[-1])
                                            or math.isclose(math.log10(mark) % 1, 0, abs_tol=1e-6)]


def _short(value: float) -> str:
    return f"{value:.6g}"
