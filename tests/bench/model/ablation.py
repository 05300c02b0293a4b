"""Effect of training settings on the images: a base run, and runs that differ from it in one setting.

    python tests/bench/model/ablation.py --root data/demo           # the demo's images and databases: hours on one core
    python tests/bench/model/ablation.py --root data/demo --table   # of the runs that exist, no new ones

Each run trains a small network on the demo's emoji. A setting is trained with `--seeds` seeds, the base with
`--base-seeds`. A seed determines the first weights, the batches and the noise. `evaluate` generates images of held-out
subjects with each style's database, and classifies them; the classifier is that of the first run. The runs are in the
root as abl-..., so an interrupted bench resumes, and sealed work is not repeated. It is one process. Set
OMP_NUM_THREADS=1 for one thread.

The table's intervals are 95 %. The interval of a difference to the base has two parts: the spread of the prompts'
paired differences (the prompts are the same for all runs), and the pooled spread of runs that differ only in the seed.
A difference that is larger than its interval is bold. Other columns are bold if they differ from the base by more than
the spread of the seeds allows.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for a checkout that was not installed

from jobs.cli.main import main as cli_main
from jobs.config.recipes import emoji_32
from jobs.evaluation import summary
from jobs.evaluation.judge_stage import StyleClassifierStage
from jobs.runs.metrics import read_metrics
from jobs.runs.run import Run
from pipeline import storage
from pipeline.corpora.emoji import STYLES
from pipeline.datasets.dataset import Dataset

# emoji_32 with half its width and half its batch: a run takes minutes. Training and sampling use four neighbors.
BASE = ("--recipe", "emoji_32", "--model-channels", "64", "--global-batch", "16", "--lr", "2e-3", "--ema-decay",
        "0.995", "--k", "4", "--no-random-k", "--log-every", "100")
RUNS: dict[str, tuple[str, ...]] = {
    "base": (),
    "epsilon": ("--prediction", "epsilon"),
    "v": ("--prediction", "v"),
    "flow": ("--prediction", "flow"),
    "own-caption": ("--own", "caption"),
    "everybody": ("--p-uncond", "0"),
    "null": ("--learned-null",),
    "own-image": ("--own", "image"),
    "min-snr": ("--min-snr", "5"),
    "random-k": ("--random-k",),
    "drop": ("--p-drop-neighbor", "0.1"),
    "noise": ("--neighbor-noise", "0.2"),
}
_UNGUIDED = ("--guidance", "1")


@dataclass(frozen=True)
class Row:
    """A row of the table: a run, and the options of its sampling."""

    title: str
    run: str
    evaluation: str = "drawn"
    flags: tuple[str, ...] = ()
    baseline: str = "base-drawn"


ROWS = (
    Row("base: x0, zeros as the null condition in 10 %, four neighbors", "base"),
    Row("`--prediction epsilon`", "epsilon"), Row("`--prediction v`", "v"), Row("`--prediction flow`", "flow"),
    Row("`--min-snr 5`", "min-snr"), Row("`--learned-null`", "null"), Row("`--p-uncond 0`", "everybody"),
    Row("`--own image`", "own-image"), Row("`--own caption`", "own-caption"),
    Row("`--random-k`", "random-k"), Row("`--p-drop-neighbor 0.1`", "drop"), Row("`--neighbor-noise 0.2`", "noise"),
    Row("base, sampled without guidance", "base", "unguided", _UNGUIDED, ""),
    Row("`--p-uncond 0`, sampled without guidance", "everybody", "unguided", _UNGUIDED, "base-unguided"),
)
# Losses are comparable for equal target, weights and condition. --own gives the network more, so it is another task.
_COMPARABLE = {"base", "null", "everybody", "random-k", "drop", "noise"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="a folder that the demo has made")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--base-seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=40, help="held-out subjects, in each of the eight styles")
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    args = parser.parse_args()
    root = Path(args.root)
    if not (root / "datasets" / "heldout" / "v1" / "neighbors" / "train").is_dir():
        parser.error(f"{root} has no held-out dataset with neighbors in the training set\n"
                     f"hint: python -m jobs demo --root {root}")
    if not args.table:
        os.environ.setdefault("WANDB_MODE", "disabled")
        for name in ("train", "heldout"):  # what --own caption reads
            _run_verb("embed", name, "--captions", "--root", str(root))
        for seed in range(args.base_seeds):  # first, because the others need their spread
            _run(root, "base", seed, args.steps, args.prompts)
        for seed in range(args.seeds):
            for name in RUNS:
                _run(root, name, seed, args.steps, args.prompts)
    print(_table(root), end="")
    return 0


def _run_verb(*words: str) -> None:
    """A command of the project, in this process; SystemExit with its code if it failed."""
    with contextlib.redirect_stdout(sys.stderr):
        if code := cli_main([*words, "--local"]):
            raise SystemExit(code)


def _run(root: Path, name: str, seed: int, steps: int, prompts: int) -> None:
    run = Run.parse(str(root), f"abl-{name}-{seed}")
    print(f"-- {run.name}", file=sys.stderr, flush=True)
    _run_verb("train", run.name, "--dataset", "train", "--validation", "heldout", "--root", str(root), *BASE,
              *RUNS[name], "--seed", str(seed), "--steps", str(steps), "--checkpoint-every", str(steps))
    _share_judges(root, run)
    # Heun's sampler asks the network twice in a step.
    sampler_flags = ("--sampler", "heun", "--steps", "8") if name == "flow" else ()
    databases = [word for style in sorted(STYLES) for word in ("--database", style)]
    for row in ROWS:
        if row.run == name:
            _run_verb("evaluate", run.name, "--recipe", "emoji_32", "--root", str(root), *databases, "--name",
                      row.evaluation, "--ways", "database", "--sweep-k", "--sweep-guidance", "--prompts", str(prompts),
                      "--seeds", "1", *sampler_flags, *row.flags)


def _share_judges(root: Path, run: Run) -> None:
    """A style classifier depends on a run only by its image size, so one for these databases serves all runs."""
    databases = [Dataset.parse(str(root), style) for style in sorted(STYLES)]
    judging = StyleClassifierStage(run, Dataset.parse(str(root), "train"), databases, emoji_32().evaluate.judge_steps)
    own_folder = storage.local_path(judging.folder)
    existing_folders = [path.parent for path in sorted(root.glob(f"runs/*/judges/{own_folder.name}/manifest.json"))]
    if existing_folders and not own_folder.exists():
        shutil.copytree(existing_folders[0], own_folder)


def _evaluations(root: Path, row: Row) -> list[dict[str, Any]]:
    """Per seed: the evaluation, the style that the classifier gave each image, and the losses."""
    evaluations = []
    for manifest in sorted(root.glob(f"runs/abl-{row.run}-[0-9]*/evaluations/{row.evaluation}/manifest.json")):
        folder = manifest.parent
        run = Run.parse(str(root), folder.parents[1].name)
        document = json.loads((folder / "evaluation.json").read_text())
        styles = [json.loads((folder / f"database-{style}.json").read_text()) for style in document["styles"]]
        # (prompts, styles); one image of each
        right = np.array([np.array(style["judge"])[:, 0] == style["style"] for style in styles]).T.astype(float)
        clip = np.array([np.array(style["clip"])[:, 0] for style in styles]).T
        last = read_metrics(run, "validation.jsonl")[-1]
        evaluations.append({"judge": 100 * right, "clip": clip, "kid": document["ways"][0]["kid"],
                            "loss": last["validation_loss"], "shuffled": last["validation_shuffled"]})
    return evaluations


def _table(root: Path) -> str:
    runs_by_row = {(row.run, row.evaluation): _evaluations(root, row) for row in ROWS}
    if not any(runs_by_row.values()):
        raise SystemExit(f"{root} has no run of this script\nhint: the same command without --table")
    spread = {name: _spread([np.array([np.mean(run[name]) for run in runs]) for key, runs in runs_by_row.items()
                             if key[1] == "drawn" and (name != "loss" or key[0] in _COMPARABLE)])
              for name in ("judge", "clip", "kid", "loss")}
    lines = ["| | judge | less the base's | KID | CLIP score | validation loss |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        runs = runs_by_row[row.run, row.evaluation]
        base = runs_by_row[tuple(row.baseline.rsplit("-", 1))] if row.baseline else []
        if not runs:
            continue
        same = runs is base or not base
        cells = [summary.format_percent(summary.interval(np.mean([run["judge"] for run in runs], 0) / 100)),
                 "" if same else _difference("judge", runs, base, spread, "{:+.1f}")]
        for name, form in (("kid", "{:.3f}"), ("clip", "{:.3f}"), ("loss", "{:.4f}")):
            text = form.format(np.mean([np.mean(run[name]) for run in runs]))
            if name == "loss" and (row.run not in _COMPARABLE or row.evaluation != "drawn"):
                text = ""
            elif not same and _beyond(name, runs, base, spread):
                text = f"**{text}**"
            cells.append(text)
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    count = {len(runs) for runs in runs_by_row.values() if runs}
    lines += ["", f"{min(count)} to {max(count)} runs of each. Runs that differ in the seed alone differ by (standard "
              f"deviation, degrees of freedom): " + ", ".join(
                  f"{name} {value:.3g} ({freedom})" for name, (value, freedom) in spread.items())]
    return "\n".join(lines) + "\n"


def _spread(groups: list[np.ndarray]) -> tuple[float, int]:
    """The standard deviation within groups, pooled, and its degrees of freedom."""
    freedom = sum(len(group) - 1 for group in groups if len(group))
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups if len(group))
    return (float(np.sqrt(squares / freedom)) if freedom else float("nan")), freedom


def _error(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]], spread: dict[str, Any]) -> float:
    """Half of the interval of a difference between means of runs."""
    value, freedom = spread[name]
    if not freedom:
        return float("nan")
    parts = [(value ** 2 * (1 / len(runs) + 1 / len(base)), freedom)]
    if np.ndim(runs[0][name]):  # one value per prompt, the same prompts for both
        paired = np.mean([run[name] for run in runs], (0, 2)) - np.mean([run[name] for run in base], (0, 2))
        parts.append((paired.var(ddof=1) / len(paired), len(paired) - 1))
    squared = sum(variance for variance, _ in parts)
    # Welch and Satterthwaite's degrees of freedom of a sum of variances.
    together = squared ** 2 / sum(variance ** 2 / degrees for variance, degrees in parts)
    return float(stats.t.ppf(0.975, together) * np.sqrt(squared))


def _beyond(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]], spread: dict[str, Any]) -> bool:
    difference = np.mean([np.mean(run[name]) for run in runs]) - np.mean([np.mean(run[name]) for run in base])
    return abs(difference) > _error(name, runs, base, spread)


def _difference(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]], spread: dict[str, Any],
                form: str) -> str:
    difference = float(np.mean([run[name] for run in runs]) - np.mean([run[name] for run in base]))
    error = _error(name, runs, base, spread)
    text = f"{form.format(difference)} [{form.format(difference - error)}, {form.format(difference + error)}]"
    return f"**{text}**" if abs(difference) > error else text


if __name__ == "__main__":
    raise SystemExit(main())
