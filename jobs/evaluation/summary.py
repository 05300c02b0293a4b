"""The results of an evaluation: means with confidence intervals, and a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np

NAMES = {"database": "the database", "prompt": "the prompt, mixed database", "both": "both",
         "text": "the prompt, no neighbors", "neither": "nothing, mixed database"}
_DRAWS = 2000
_LEAST_SKILL = 0.1  # of the way from chance to always right


def summarize(results: Sequence[dict[str, Any]], styles: Sequence[str], judges: dict[str, Any]) -> dict[str, Any]:
    """The results of each way in order, and those of real held-out images.

    `found` has a dict for each way and style: `judge`, `probe` (seen styles), `clip`, `nearest` (P, seeds), `kid`.
    """
    ways: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        ways.setdefault(result["way"], []).append(result)
    rows = [_summarize_way(way, ways[way], styles) for way in ways]
    return {"styles": list(styles), "ways": rows, "real": {key: judges[key] for key in (
        "judge", "probe", "nearest", "nearest_99")} | {"styles": judges["styles"]}}


def _summarize_way(way: str, results: list[dict[str, Any]], styles: Sequence[str]) -> dict[str, Any]:
    """The means of one way over styles, prompts and seeds; each style for itself."""
    if way == "neither":  # asks for no style: how often each comes by itself
        seen = np.array(results[0]["judge"])
        return {"way": way, "prompts": len(results[0]["prompts"]), "judge": {"mean": round(1 / len(styles), 4)},
                "clip": interval(np.array(results[0]["clip"])), "nearest": interval(np.array(results[0]["nearest"])),
                "seen": {style: round(float((seen == number).mean()), 4) for number, style in enumerate(styles)}}
    by_style = sorted(results, key=lambda result: result["style"])
    # Arrays are (styles, P, seeds).
    right = {name: np.array([np.array(result[name]) == result["style"] for result in by_style])
             for name in ("judge", "probe")}
    values = {name: np.array([result[name] for result in by_style]) for name in ("clip", "nearest")}
    row: dict[str, Any] = {"way": way, "prompts": len(by_style[0]["prompts"])}
    for name, table in (right | values).items():
        row[name] = interval(table.astype(float).transpose(1, 0, 2))
    row["kid"] = round(float(np.mean([result["kid"] for result in by_style])), 6)
    row["styles"] = [{"style": styles[result["style"]], "judge": interval(right["judge"][number].astype(float)),
                      "probe": round(float(right["probe"][number].mean()), 4),
                      "clip": round(float(values["clip"][number].mean()), 4), "kid": result["kid"],
                      "taken_for": {styles[seen]: round(float((np.array(result["judge"]) == seen).mean()), 4)
                                    for seen in np.unique(result["judge"])}}
                     for number, result in enumerate(by_style)]
    return row


def interval(values: np.ndarray) -> dict[str, float]:
    """The mean of values (P, ...), and an interval of 95 %.

    The interval is a bootstrap over prompts, because images of one prompt are alike.
    """
    means = values.reshape(len(values), -1).mean(1)
    draws = np.random.default_rng(0).integers(len(means), size=(_DRAWS, len(means)))
    low, high = np.quantile(means[draws].mean(1), (0.025, 0.975))
    return {"mean": round(float(means.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def markdown_table(document: dict[str, Any]) -> str:
    """The main ways, what real images get, and the sweeps, as two tables of Markdown."""
    real = document["real"]
    lines = ["| the style is named by | judge | probe | CLIP score | KID | nearest in training |",
             "|---|---|---|---|---|---|"]
    for row in document["ways"]:
        if row["way"] in NAMES:
            none = row["way"] == "neither"
            lines.append(f"| {NAMES[row['way']]} | {'' if none else format_percent(row['judge'])} | "
                         f"{'' if none else format_percent(row['probe'])} | {row['clip']['mean']:.3f} | "
                         f"{'' if none else format(row['kid'], '.4f')} | {row['nearest']['mean']:.3f} |")
    kid = float(np.mean([style["kid"] for style in real["styles"]]))
    lines.append(f"| real images of held-out subjects | {100 * real['judge']:.1f} % | {100 * real['probe']:.1f} % "
                 f"| | {kid:.4f} | {real['nearest']:.3f} |")
    sweeps = [row for row in document["ways"] if row["way"] not in NAMES]
    if sweeps:
        lines += ["", "| swapped databases | judge | probe | CLIP score | KID |", "|---|---|---|---|---|"]
        lines += [f"| {row['way'].replace('-', ' = ', 1)} | {format_percent(row['judge'])} | "
                  f"{format_percent(row['probe'])} | {row['clip']['mean']:.3f} | {row['kid']:.4f} |" for row in sweeps]
    chance = 1 / len(document["styles"])
    return "\n".join([*lines, "", f"{len(document['styles'])} styles, so chance is {100 * chance:.1f} %; in brackets "
                      f"95 % of bootstrapped prompts.", *describe_weak_judges(document)]) + "\n"


def describe_weak_judges(document: dict[str, Any]) -> list[str]:
    """A sentence for each judge that is hardly better than chance on real images, of all styles or of some."""
    sentences = []
    for judge, cure in (("judge", "--judge-steps trains it longer."), ("probe", "Its encoder may see no styles.")):
        if is_weak(document, judge):
            sentences.append(f"The {judge} is right for {100 * document['real'][judge]:.1f} % of the real images, "
                             f"which is hardly more than chance: its figures mean nothing. {cure}")
        elif styles := [style["database"] for style in document["real"]["styles"]
                        if _is_hardly_chance(style[judge], len(document["styles"]))]:
            sentences.append(f"The {judge} is hardly better than chance on the real images of {', '.join(styles)}. Its "
                             f"figures for them mean nothing, and the means of all styles little. To leave them out, "
                             f"name the other databases.")
    return sentences


def is_weak(document: dict[str, Any], judge: str) -> bool:
    """Whether a judge of an evaluation is hardly better than chance on real images."""
    return _is_hardly_chance(document["real"][judge], len(document["styles"]))


def _is_hardly_chance(right: float, styles: int) -> bool:
    chance = 1 / styles
    return bool(right - chance < _LEAST_SKILL * (1 - chance))


def format_percent(value: dict[str, float]) -> str:
    """A share and its interval, in percent."""
    return f"{100 * value['mean']:.1f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
