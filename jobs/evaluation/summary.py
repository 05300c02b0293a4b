"""What an evaluation found: means with intervals, a table, a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"database": "the database", "prompt": "the prompt, mixed database", "both": "both",
         "text": "the prompt, no neighbours", "neither": "nothing, mixed database"}
_DRAWS = 2000


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
    """Style accuracy of the ways, of each style, and over the sweeps, with intervals, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = [row for row in document["ways"] if row["way"] in NAMES and row["way"] != "neither"]
    sweeps = {name: [(float(row["way"].split("-", 1)[1]), row) for row in document["ways"]
                     if row["way"].startswith(f"{name}-")] for name in ("k", "guidance")}
    chance, styles = 100 / len(document["styles"]), document["styles"]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4.4), width_ratios=(1.2, 2.6, 1, 1), layout="constrained")
    colours = pyplot.get_cmap("tab10").colors
    axes[0].bar(range(len(ways)), [100 * row["judge"]["mean"] for row in ways],
                yerr=_errors(row["judge"] for row in ways), color=colours[:len(ways)], capsize=3)
    axes[0].set_xticks(range(len(ways)), [NAMES[row["way"]].replace(", ", ",\n") for row in ways], rotation=30,
                       ha="right")
    axes[0].set_title("what names the style")
    wide = 0.8 / max(1, len(ways))
    for number, row in enumerate(ways):
        places = [place + (number - (len(ways) - 1) / 2) * wide for place in range(len(styles))]
        axes[1].bar(places, [100 * one["judge"]["mean"] for one in row["styles"]], wide,
                    yerr=_errors(one["judge"] for one in row["styles"]), color=colours[number], label=NAMES[row["way"]])
    axes[1].plot(range(len(styles)), [100 * one["judge"] for one in document["real"]["styles"]], "k_", markersize=18,
                 label="real pictures")
    axes[1].set_xticks(range(len(styles)), styles, rotation=30, ha="right")
    axes[1].set_title("style by style")
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=len(ways) + 1)
    for axis, (name, points) in zip(axes[2:], sweeps.items(), strict=True):
        points.sort(key=lambda point: point[0])
        for what, style in (("judge", "o-"), ("probe", "s--")):
            axis.errorbar([x for x, _ in points], [100 * row[what]["mean"] for _, row in points],
                          yerr=_errors(row[what] for _, row in points), fmt=style, capsize=3, label=what)
        if points:
            axis.set_xscale("log", base=2)
            axis.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
            axis.legend(fontsize=7)
        axis.set_title("swapped databases")
        axis.set_xlabel("neighbours k" if name == "k" else name)
    for axis in axes:
        axis.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
        axis.set_ylim(0, 100)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("style as asked for, %")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _errors(values: Any) -> list[list[float]]:
    """How far below and above the mean the intervals reach, in percent."""
    found = list(values)
    return [[max(0.0, 100 * (one["mean"] - one.get("low", one["mean"]))) for one in found],
            [max(0.0, 100 * (one.get("high", one["mean"]) - one["mean"])) for one in found]]
