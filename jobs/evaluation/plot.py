"""The plot of an evaluation: style accuracy with confidence intervals."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evaluation.summary import NAMES
from jobs.telemetry import plot_style

if TYPE_CHECKING:
    from jobs.telemetry.plot_style import Axes
_PLOT_SIZE, _PIXEL_RATIO = (1086, 340), 1.5
"""CSS pixels of the plot, those of the report's column, and pixels of the PNG for each."""
_INTERVAL: dict[str, Any] = {"capsize": 2.5, "error_kw": {"ecolor": plot_style.COLORS["ink"], "elinewidth": 1}}


def write_plot(document: dict[str, Any], path: Path) -> None:
    """Write a PNG: style accuracy of each way, of each style, and over each sweep that was made, with intervals."""
    ways = [row for row in document["ways"] if row["way"] in NAMES and row["way"] != "neither"]
    with plot_style.plot_style():
        figure = plot_style.new_figure(*_PLOT_SIZE, layout="constrained")
        sweeps = {name: points for name in ("k", "guidance") if (points := _sweep_points(name, document))}
        axes = figure.subplots(1, 2 + len(sweeps), width_ratios=(1.2, 2.6, *[1] * len(sweeps)))
        _plot_ways(axes[0], ways)
        _plot_styles(axes[1], ways, document)
        for axis, (name, points) in zip(axes[2:], sweeps.items(), strict=True):
            _plot_sweep(axis, name, points)
        for axis in axes:
            axis.axhline(100 / len(document["styles"]), color=plot_style.COLORS["quiet"], linewidth=1, linestyle=":")
            axis.set_ylim(0, 100)
            axis.grid(axis="y")
        axes[0].set_ylabel("right style, %")
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=len(ways) + 1)
        plot_style.save_png(figure, path, _PIXEL_RATIO)


def _plot_ways(axis: "Axes", ways: Sequence[dict[str, Any]]) -> None:
    axis.bar(range(len(ways)), [100 * row["judge"]["mean"] for row in ways], color=plot_style.SERIES[:len(ways)],
             yerr=_error_bars(row["judge"] for row in ways), **_INTERVAL)
    axis.set_xticks(range(len(ways)), [NAMES[row["way"]].replace(", ", ",\n") for row in ways], rotation=35, ha="right",
                    rotation_mode="anchor")
    axis.margins(x=0.06)
    axis.set_title("style named by")


def _plot_styles(axis: "Axes", ways: Sequence[dict[str, Any]], document: dict[str, Any]) -> None:
    styles = document["styles"]
    width = 0.8 / max(1, len(ways))
    for number, row in enumerate(ways):
        places = [place + (number - (len(ways) - 1) / 2) * width for place in range(len(styles))]
        axis.bar(places, [100 * style["judge"]["mean"] for style in row["styles"]], width,
                 color=plot_style.SERIES[number], yerr=_error_bars(style["judge"] for style in row["styles"]),
                 label=NAMES[row["way"]], **_INTERVAL)
    axis.plot(range(len(styles)), [100 * style["judge"] for style in document["real"]["styles"]], "_", markersize=26,
              markeredgewidth=1.5, color=plot_style.COLORS["ink"], label="real images")
    axis.set_xticks(range(len(styles)), styles, rotation=35, ha="right", rotation_mode="anchor")
    axis.margins(x=0.02)
    axis.set_title("each style")


def _sweep_points(name: str, document: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """The values of `k` or `guidance` that were measured, ascending, with their results."""
    return sorted(((float(row["way"].split("-", 1)[1]), row) for row in document["ways"]
                   if row["way"].startswith(f"{name}-")), key=lambda point: point[0])


def _plot_sweep(axis: "Axes", name: str, points: Sequence[tuple[float, dict[str, Any]]]) -> None:
    """Style accuracy over the values of `k` or `guidance`."""
    for judge, line, color in (("judge", "o-", plot_style.SERIES[0]), ("probe", "s--", plot_style.SERIES[1])):
        axis.errorbar([x for x, _ in points], [100 * row[judge]["mean"] for _, row in points], fmt=line, color=color,
                      yerr=_error_bars(row[judge] for _, row in points), markersize=5, capsize=3, label=judge)
    axis.set_xscale("log", base=2)
    axis.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
    axis.margins(x=0.08)
    axis.legend(loc="best")
    axis.set_title("swapped databases")
    axis.set_xlabel("neighbors k" if name == "k" else name)


def _error_bars(values: Iterable[dict[str, float]]) -> list[list[float]]:
    """The distances from the mean down and up to the ends of the interval, in percent."""
    intervals = list(values)
    return [[max(0.0, 100 * (interval["mean"] - interval.get("low", interval["mean"]))) for interval in intervals],
            [max(0.0, 100 * (interval.get("high", interval["mean"]) - interval["mean"])) for interval in intervals]]
