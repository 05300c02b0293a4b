"""What an evaluation found: means with intervals, a table, a plot."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.telemetry import plot_style

if TYPE_CHECKING:
    from jobs.telemetry.plot_style import Axes

NAMES = {"database": "the database", "prompt": "the prompt, mixed database", "both": "both",
         "text": "the prompt, no neighbours", "neither": "nothing, mixed database"}
_DRAWS = 2000
_PLOT_SIZE, _PIXEL_RATIO = (1086, 340), 1.5
"""CSS pixels of the plot, those of the report's column, and pixels of the PNG for each."""
_INTERVAL = {"capsize": 2.5, "error_kw": {"ecolor": plot_style.COLORS["ink"], "elinewidth": 1}}


def summary(found: Sequence[dict[str, Any]], styles: Sequence[str], judges: dict[str, Any]) -> dict[str, Any]:
    """The ways that were tried, in order, and beside them what real held-out pictures get.

    `found` has a dict for each way and style: `judge`, `probe` (seen styles), `clip`, `nearest` (P, seeds), `kid`.
    """
    ways: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        ways.setdefault(one["way"], []).append(one)
    rows = [_row(way, ways[way], styles) for way in ways]
    return {"styles": list(styles), "ways": rows, "real": {key: judges[key] for key in (
        "judge", "probe", "nearest", "nearest_99")} | {"styles": judges["styles"]}}


def _row(way: str, found: list[dict[str, Any]], styles: Sequence[str]) -> dict[str, Any]:
    """The means of one way over styles, prompts and seeds; each style for itself."""
    if way == "neither":  # asks for no style: how often each comes by itself
        seen = np.array(found[0]["judge"])
        return {"way": way, "prompts": len(found[0]["prompts"]), "judge": {"mean": round(1 / len(styles), 4)},
                "clip": interval(np.array(found[0]["clip"])), "nearest": interval(np.array(found[0]["nearest"])),
                "seen": {style: round(float((seen == number).mean()), 4) for number, style in enumerate(styles)}}
    by_style = sorted(found, key=lambda one: one["style"])
    right = {name: np.array([np.array(one[name]) == one["style"] for one in by_style]) for name in ("judge", "probe")}
    values = {name: np.array([one[name] for one in by_style]) for name in ("clip", "nearest")}  # (styles, P, seeds)
    row: dict[str, Any] = {"way": way, "prompts": len(by_style[0]["prompts"])}
    for name, table in (right | values).items():
        row[name] = interval(table.astype(float).transpose(1, 0, 2))
    row["kid"] = round(float(np.mean([one["kid"] for one in by_style])), 6)
    row["styles"] = [{"style": styles[one["style"]], "judge": interval(right["judge"][number].astype(float)),
                      "probe": round(float(right["probe"][number].mean()), 4),
                      "clip": round(float(values["clip"][number].mean()), 4), "kid": one["kid"],
                      "taken_for": {styles[seen]: round(float((np.array(one["judge"]) == seen).mean()), 4)
                                    for seen in np.unique(one["judge"])}}
                     for number, one in enumerate(by_style)]
    return row


def interval(values: np.ndarray) -> dict[str, float]:
    """The mean of values (P, ...), and 95 % of the means of prompts drawn anew (bootstrap): pictures of one prompt are
    alike, so prompts are drawn and not pictures.
    """
    means = values.reshape(len(values), -1).mean(1)
    draws = np.random.default_rng(0).integers(len(means), size=(_DRAWS, len(means)))
    low, high = np.quantile(means[draws].mean(1), (0.025, 0.975))
    return {"mean": round(float(means.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def table(document: dict[str, Any]) -> str:
    """The main ways, what real pictures get, and the sweeps, as two tables of Markdown."""
    real = document["real"]
    lines = ["| the style is named by | judge | probe | CLIP score | KID | nearest in training |",
             "|---|---|---|---|---|---|"]
    for row in document["ways"]:
        if row["way"] in NAMES:
            none = row["way"] == "neither"
            lines.append(f"| {NAMES[row['way']]} | {'' if none else percent(row['judge'])} | "
                         f"{'' if none else percent(row['probe'])} | {row['clip']['mean']:.3f} | "
                         f"{'' if none else format(row['kid'], '.4f')} | {row['nearest']['mean']:.3f} |")
    kid = float(np.mean([one["kid"] for one in real["styles"]]))
    lines.append(f"| real pictures of held-out subjects | {100 * real['judge']:.1f} % | {100 * real['probe']:.1f} % "
                 f"| | {kid:.4f} | {real['nearest']:.3f} |")
    sweeps = [row for row in document["ways"] if row["way"] not in NAMES]
    if sweeps:
        lines += ["", "| swapped databases | judge | probe | CLIP score | KID |", "|---|---|---|---|---|"]
        lines += [f"| {row['way'].replace('-', ' = ', 1)} | {percent(row['judge'])} | {percent(row['probe'])} | "
                  f"{row['clip']['mean']:.3f} | {row['kid']:.4f} |" for row in sweeps]
    chance = 1 / len(document["styles"])
    return "\n".join([*lines, "", f"{len(document['styles'])} styles, so chance is {100 * chance:.1f} %; in brackets "
                      f"95 % of bootstrapped prompts."]) + "\n"


def percent(value: dict[str, float]) -> str:
    """A share and its interval, in percent."""
    return f"{100 * value['mean']:.1f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def plot(document: dict[str, Any], path: Path) -> None:
    """Write a PNG: style accuracy of each way, of each style, and over the sweeps, with intervals."""
    ways = [row for row in document["ways"] if row["way"] in NAMES and row["way"] != "neither"]
    with plot_style.plot_style():
        figure = plot_style.new_figure(*_PLOT_SIZE, layout="constrained")
        axes = figure.subplots(1, 4, width_ratios=(1.2, 2.6, 1, 1))
        _plot_ways(axes[0], ways)
        _plot_styles(axes[1], ways, document)
        for axis, name in zip(axes[2:], ("k", "guidance"), strict=True):
            _plot_sweep(axis, name, document)
        for axis in axes:
            axis.axhline(100 / len(document["styles"]), color=plot_style.COLORS["quiet"], linewidth=1, linestyle=":")
            axis.set_ylim(0, 100)
            axis.grid(axis="y")
        axes[0].set_ylabel("right style, %")
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=len(ways) + 1)
        plot_style.save_png(figure, path, _PIXEL_RATIO)


def _plot_ways(axis: "Axes", ways: Sequence[dict[str, Any]]) -> None:
    axis.bar(range(len(ways)), [100 * row["judge"]["mean"] for row in ways], color=plot_style.SERIES[:len(ways)],
             yerr=_errors(row["judge"] for row in ways), **_INTERVAL)
    axis.set_xticks(range(len(ways)), [NAMES[row["way"]].replace(", ", ",\n") for row in ways], rotation=35, ha="right",
                    rotation_mode="anchor")
    axis.margins(x=0.06)
    axis.set_title("style named by")


def _plot_styles(axis: "Axes", ways: Sequence[dict[str, Any]], document: dict[str, Any]) -> None:
    styles = document["styles"]
    width = 0.8 / max(1, len(ways))
    for number, row in enumerate(ways):
        places = [place + (number - (len(ways) - 1) / 2) * width for place in range(len(styles))]
        axis.bar(places, [100 * one["judge"]["mean"] for one in row["styles"]], width, color=plot_style.SERIES[number],
                 yerr=_errors(one["judge"] for one in row["styles"]), label=NAMES[row["way"]], **_INTERVAL)
    axis.plot(range(len(styles)), [100 * one["judge"] for one in document["real"]["styles"]], "_", markersize=26,
              markeredgewidth=1.5, color=plot_style.COLORS["ink"], label="real images")
    axis.set_xticks(range(len(styles)), styles, rotation=35, ha="right", rotation_mode="anchor")
    axis.margins(x=0.02)
    axis.set_title("each style")


def _plot_sweep(axis: "Axes", name: str, document: dict[str, Any]) -> None:
    """Style accuracy over the values of `k` or `guidance`."""
    points = sorted(((float(row["way"].split("-", 1)[1]), row) for row in document["ways"]
                     if row["way"].startswith(f"{name}-")), key=lambda point: point[0])
    for judge, line, color in (("judge", "o-", plot_style.SERIES[0]), ("probe", "s--", plot_style.SERIES[1])):
        axis.errorbar([x for x, _ in points], [100 * row[judge]["mean"] for _, row in points], fmt=line, color=color,
                      yerr=_errors(row[judge] for _, row in points), markersize=5, capsize=3, label=judge)
    if points:
        axis.set_xscale("log", base=2)
        axis.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
        axis.margins(x=0.08)
        axis.legend(loc="best")
    axis.set_title("swapped databases")
    axis.set_xlabel("neighbors k" if name == "k" else name)


def _errors(values: Iterable[dict[str, float]]) -> list[list[float]]:
    """The distances from the mean down and up to the ends of the interval, in percent."""
    found = list(values)
    return [[max(0.0, 100 * (one["mean"] - one.get("low", one["mean"]))) for one in found],
            [max(0.0, 100 * (one.get("high", one["mean"]) - one["mean"])) for one in found]]
