"""Images per second from a folder to tars, compared with a bare loop of the same decoder.

    python tests/bench/data/folder.py [--images 2000] [--repeats 3] [--work FOLDER]

The bare loop reads a file, decodes, resizes and encodes it by the functions of pipeline.media. It writes no tars, no
hashes, no metadata and no plan. So a ratio of 0.9 says that these cost a tenth of the time. A second loop only decodes
at full size. Prints a Markdown table of medians.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
from download import QUALITY, SIZE, seconds_of_shards
from harness import Failed, machine, measure, versions

from pipeline.media.decode import decode
from pipeline.media.resize import encode, resize

_PER_SHARD = 1000
_MAX_PIXELS = 100_000_000


@dataclass
class Result:
    """One run over the folder."""

    who: str
    pictures: int
    wall_s: float
    work_s: float
    cpu_s: float
    peak_mb: float
    others_cores: float


def _whole_way(paths: list[Path]) -> int:
    """Read, decode, resize and encode. The bytes of all images."""
    total = 0
    for path in paths:
        picture = decode(path.read_bytes(), _MAX_PIXELS, at_least=SIZE, how="keep_ratio")
        total += len(encode(resize(picture, SIZE, "keep_ratio"), "jpg", QUALITY))
    return total


def _decode_alone(paths: list[Path]) -> int:
    return sum(decode(path.read_bytes(), _MAX_PIXELS).width for path in paths)


def _run_bare_loop(folder: Path, processes: int, whole_way: bool) -> None:
    """Run the loop in several processes. Prints the seconds without the start of the processes."""
    paths, work = sorted(folder.glob("*.jpg")), _whole_way if whole_way else _decode_alone
    with ProcessPoolExecutor(processes) as pool:
        parts = [paths[first::processes] for first in range(processes)]
        list(pool.map(work, [paths[:1]] * processes * 2))
        begin = time.perf_counter()
        list(pool.map(work, parts))
        print(json.dumps(time.perf_counter() - begin))


def _measure_bare_loop(folder: Path, count: int, processes: int, whole_way: bool, log: Path) -> Result:
    usage = measure([sys.executable, __file__, "--bare", str(folder), "--processes", str(processes),
                     *([] if whole_way else ["--decode-alone"])], log)
    who = "bare loop" if whole_way else "decoding alone, full size"
    return Result(f"{who}, {processes} process{'es' if processes > 1 else ''}", count, usage.wall_s,
                  json.loads(usage.stdout), usage.cpu_s, usage.peak_mb, usage.others_cores)


def _measure_stage(folder: Path, root: Path, local: bool) -> Result:
    shutil.rmtree(root, ignore_errors=True)
    usage = measure(
        [sys.executable, "-m", "jobs", "shard", "bench", "--source", str(folder), "--root", str(root), "--image-size",
         str(SIZE), "--resize", "keep_ratio", "--format", "jpg", "--quality", str(QUALITY), "--samples-per-shard",
         str(_PER_SHARD), *(["--local"] if local else ["--workers", "2"])], root.with_suffix(".log"))
    summary = json.loads(usage.stdout.splitlines()[-1])
    return Result("shard --local" if local else "shard, 2 workers", summary["samples"], usage.wall_s,
                  seconds_of_shards(root / "datasets" / "bench" / "v1" / "shards"), usage.cpu_s, usage.peak_mb,
                  usage.others_cores)


def table(results: list[Result]) -> str:
    """Medians as a Markdown table; ratios of speeds are to the two loops in two processes, in the same turn."""
    names = list(dict.fromkeys(result.who for result in results))
    runs = {name: [result for result in results if result.who == name] for name in names}
    speeds = {name: [result.pictures / result.work_s for result in runs[name]] for name in names}

    def speed_ratio(name: str, other: str) -> str:
        # Ratios are taken turn by turn, because other load on the machine changes.
        return f"{statistics.median(a / b for a, b in zip(speeds[name], speeds[other], strict=True)):.2f}"

    rows = [["", "images/s without start-up", "to the bare loop in 2 processes", "to decoding alone in 2",
             "CPU ms an image", "peak memory (PSS), MB", "start-up and end, s", "cores busy with something else"],
            ["---"] * 8]
    for name in names:
        rows.append([name, f"{statistics.median(speeds[name]):.1f}", speed_ratio(name, "bare loop, 2 processes"),
                     speed_ratio(name, "decoding alone, full size, 2 processes"),
                     f"{statistics.median(1e3 * result.cpu_s / result.pictures for result in runs[name]):.2f}",
                     f"{statistics.median(result.peak_mb for result in runs[name]):.0f}",
                     f"{statistics.median(result.wall_s - result.work_s for result in runs[name]):.1f}",
                     f"{statistics.median(result.others_cores for result in runs[name]):.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    parser.add_argument("--bare", default="", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--decode-alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        _run_bare_loop(Path(args.bare), args.processes, not args.decode_alone)
        return 0
    work = photographs.work_folder(args.work)
    folder, results = photographs.fill_folder(work, args.images), []
    try:
        for _ in range(args.repeats):
            for whole_way in (True, False):
                for processes in (1, 2):
                    results.append(_measure_bare_loop(folder, args.images, processes, whole_way, work / "bare.log"))
            results.append(_measure_stage(folder, work / "ours-folder", local=True))
            results.append(_measure_stage(folder, work / "ours-folder", local=False))
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"{args.images} images, {args.repeats} runs each in turns; {machine()}; {versions()}\n")
    print(table(results))
    incomplete = [result for result in results if result.pictures != args.images]
    if incomplete:
        print(f"\nincomplete: {incomplete}")
    return 1 if incomplete else 0


if __name__ == "__main__":
    raise SystemExit(main())
