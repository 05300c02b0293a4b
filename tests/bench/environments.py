"""The same stages with two Python environments, in turns: seconds and CPU seconds of shard, embed, index and neighbors.

    python tests/bench/environments.py OLD/bin/python NEW/bin/python [--images 200] [--vectors 20000] [--repeats 3]

PYTHON@CHECKOUT runs another checkout of the program with that Python. Each environment has its own root with the same
images and vectors. A first turn is not counted: it leaves compiled bytecode for the others. Prints a Markdown table of
medians and of the lowest and highest run. Every run is in environments.json in the work folder.
"""

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import photographs
from harness import CHECKOUT, Failed, Usage, machine, measure, spread
from vectors import clustered

sys.path.insert(0, str(CHECKOUT / "tests/pipeline"))
import synthetic

_PER_SHARD = 10_000
_VERSIONS = ("import importlib.metadata as m, platform as p; print('Python', p.python_version(), "
             "*(f'{n} {m.version(n)}' for n in ('numpy', 'pyarrow', 'faiss-cpu', 'torch', 'pillow')))")


@dataclass
class Environment:
    """A Python, the checkout that it runs, and the root that it writes to."""

    name: str
    python: str
    checkout: str
    root: Path

    def run(self, threads: int, log: Path, *words: str) -> Usage:
        return measure(["env", "-C", self.checkout, "-u", "PYTHONDONTWRITEBYTECODE", f"OMP_NUM_THREADS={threads}",
                        self.python, *words], log)


def stages(args: argparse.Namespace, images: Path) -> dict[str, list[str]]:
    """The command line of each stage that is measured, by its name."""
    return {"shard": ["shard", "images", "--source", str(images), "--image-size", "256", "--format", "jpg"],
            "embed": ["embed", "images"],
            "index": ["index", "vectors", *(["--key", args.key] if args.key else [])],
            "neighbors": ["neighbors", "vectors"]}


def table(seconds: dict[tuple[int, str, str], list[Usage]], environments: list[Environment]) -> str:
    """Medians of both environments and their ratio, for each number of threads and stage."""
    first, second = (environment.name for environment in environments)
    lines = [f"| threads, stage | wall s: {first} | {second} | ratio | CPU s: {first} | {second} | ratio |",
             "|---" * 7 + "|"]
    for threads, stage in dict.fromkeys((threads, stage) for threads, stage, _ in seconds):
        cells = [f"{threads}, {stage}"]
        for attribute in ("wall_s", "cpu_s"):
            runs = [[getattr(usage, attribute) for usage in seconds[threads, stage, name]] for name in (first, second)]
            medians = [statistics.median(values) for values in runs]
            cells += map(spread, runs)
            cells.append(f"{medians[1] / medians[0]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def prepare(words: list[str], work: Path, args: argparse.Namespace) -> list[Environment]:
    """Both environments, each with the same vectors in its root."""
    environments = []
    for name, text in zip(("first", "second"), words, strict=True):
        python, _, checkout = text.partition("@")
        root = work / f"environments-{name}"
        shutil.rmtree(root, ignore_errors=True)
        vectors = [clustered(min(_PER_SHARD, args.vectors - start), args.dim, max(10, args.vectors // 100), start)
                   for start in range(0, args.vectors, _PER_SHARD)]
        synthetic.vector_dataset(root, "vectors", vectors, encoder=synthetic.ENCODER | {"dim": args.dim})
        environments.append(Environment(name, python, checkout or str(CHECKOUT), root))
    return environments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs=2, metavar="PYTHON[@CHECKOUT]")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--vectors", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--key", default="", help="kind of the index; by default the stage chooses")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[], help="stages to measure; those before them must be sealed")
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    args = parser.parse_args()
    work = photographs.work_folder(args.work)
    images = work / f"environments-images-{args.images}"
    images.mkdir(exist_ok=True)
    for path in photographs.make(work, args.images):
        if not (images / path.name).exists():
            shutil.copy(path, images)
    environments = prepare(args.environments, work, args)
    commands = {name: words for name, words in stages(args, images).items() if not args.only or name in args.only}
    seconds: dict[tuple[int, str, str], list[Usage]] = {}
    log = work / "environments.log"
    try:
        versions = [environment.run(1, log, "-c", _VERSIONS).stdout.strip() for environment in environments]
        for turn in range(args.repeats + 1):
            for threads in args.threads:
                for stage, words in commands.items():
                    for environment in environments if turn % 2 == 0 else environments[::-1]:
                        usage = environment.run(threads, log, "-m", "jobs", *words, "--root", str(environment.root),
                                                "--local", "--overwrite")
                        if turn:
                            seconds.setdefault((threads, stage, environment.name), []).append(usage)
                        print(f"turn {turn}, {threads} threads, {stage}, {environment.name}: {usage.wall_s:.2f} s, "
                              f"CPU {usage.cpu_s:.2f} s, others {usage.others_cores:.2f} cores", file=sys.stderr)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    (work / "environments.json").write_text(json.dumps(
        [{"threads": threads, "stage": stage, "environment": name, "wall_s": usage.wall_s, "cpu_s": usage.cpu_s,
          "peak_mb": usage.peak_mb, "others_cores": usage.others_cores}
         for (threads, stage, name), usages in seconds.items() for usage in usages], indent=1))
    print(f"{args.images} images, {args.vectors} x {args.dim} vectors, {args.repeats} runs in turns; {machine()}\n")
    print("\n".join(f"* {environment.name}: {program_versions}"
                    for environment, program_versions in zip(environments, versions, strict=True)) + "\n")
    print(table(seconds, environments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
