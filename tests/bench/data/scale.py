"""Costs of a billion rows for the driver: planning, items, manifests and resuming, measured at up to ten million.

    python tests/bench/data/scale.py [--small] [--only plan driver workers lists] [--work FOLDER]

Each measurement runs in a new process, so that its peak of memory is its own. Prints Markdown tables, and a table for
100 million and 5 billion rows that follows from the measured constants. --small uses a hundredth of each size, to test
the script. scale.json in the work folder has all figures.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
from scale_parts import PARTS, ROWS_PER_SHARD, write_laion_list

WHERE = "punsafe < 0.1 and AESTHETIC_SCORE > 5"
LISTED = 1000  # names that an object store lists in one answer


@dataclass(frozen=True)
class Sizes:
    """The sizes of all measurements."""

    rows: int = 10_000_000
    few: int = 10_000
    csv: int = 1_000_000
    trivial: int = 10_000
    pictures: int = 2000
    items: int = 1_000_000
    recorded: int = 100_000

    def small(self) -> "Sizes":
        return Sizes(*(max(value // 100, 200) for value in self.__dict__.values()))


def run_part(part: str, work: Path, **arguments: Any) -> dict[str, Any]:
    """The figures of a part of this script, from another process."""
    print(f"{part} {arguments} ...", file=sys.stderr, flush=True)
    process = subprocess.run([sys.executable, __file__, "--part", json.dumps([part, arguments]), "--work", str(work)],
                             stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def measure_planning(work: Path, sizes: Sizes) -> list[dict[str, Any]]:
    long, few = (write_laion_list(work / f"laion-{count}.parquet", count) for count in (sizes.rows, sizes.few))
    table = write_laion_list(work / f"laion-{sizes.csv}.csv", sizes.csv)
    figures = [run_part("plan", work, source=str(source), rows=rows, where=where)
               for source, rows, where in ((few, sizes.few, ""), (few, sizes.few, WHERE), (long, sizes.rows, ""),
                                           (long, sizes.rows, WHERE), (table, sizes.csv, ""))]
    print("\n| list | rows | filter | file | items | seconds | peak memory | plan |\n|---|---|---|---|---|---|---|---|")
    for row, source in zip(figures, (few, few, long, long, table), strict=True):
        print(f"| {source.suffix[1:]} | {row['rows']:,} | {row['where'] or 'none'} "
              f"| {source.stat().st_size / 1e6:,.1f} MB | {row['items']:,} | {row['seconds']:.2f} "
              f"| {row['peak_mb']:.0f} MB, {row['before_mb']:.0f} MB of it before "
              f"| {row['plan_bytes'] / 1e6:,.3f} MB |")
    return figures


def measure_driver(work: Path, sizes: Sizes, workers: list[int]) -> list[dict[str, Any]]:
    figures = [run_part("driver", work, items=items, workers=count) for items, count in (
        (sizes.trivial, 0), (4 * sizes.trivial, 0), *((sizes.trivial, count) for count in workers))]
    print("\n| trivial items | workers | items/s | driver CPU an item | driver memory grew by |\n|---|---|---|---|---|")
    for row in figures:
        print(f"| {row['items']:,} | {row['workers'] or 'in process'} | {row['items'] / row['seconds']:,.0f} "
              f"| {row['driver_cpu'] / row['items'] * 1e3:.2f} ms | {row['driver_mb']:,.0f} MB |")
    print(f"\nAll on the {os.cpu_count()} cores of one machine: more workers than that share them. In process the "
          f"driver is the worker too.")
    return figures


def measure_workers(work: Path, sizes: Sizes, workers: list[int]) -> list[dict[str, Any]]:
    figures = [run_part("shard", work, pictures=sizes.pictures, workers=count) for count in workers]
    print("\n| images | workers, each a node | images/s |\n|---|---|---|")
    for row in figures:
        print(f"| {row['pictures']:,} | {row['workers']} | {row['pictures'] / row['seconds']:,.0f} |")
    return figures


def measure_lists(work: Path, sizes: Sizes) -> dict[str, Any]:
    figures = {"lists": run_part("lists", work, items=sizes.items),
               "resume": [run_part("resume", work, items=sizes.recorded, how=how) for how in ("packs", "files")]}
    print(f"\n| of {figures['lists']['items']:,} items | seconds | bytes | peak memory so far |\n|---|---|---|---|")
    for name, row in figures["lists"].items():
        if name != "items":
            length = f"{row['bytes']:,}" if "bytes" in row else ""
            print(f"| {name} | {row['seconds']:.1f} | {length} | {row['peak_mb']:,.0f} MB |")
    print("\n| records there | from | seconds | memory |\n|---|---|---|---|")
    for row in figures["resume"]:
        print(f"| {row['items']:,} | {row['from']} | {row['seconds']:.2f} | {row['mb']:.0f} MB |")
    return figures


def print_extrapolation(figures: dict[str, Any], sizes: Sizes) -> None:
    """Costs of 100 million and 5 billion rows, by the measured constants."""
    row_s = (figures["plan"][2]["seconds"] - figures["plan"][0]["seconds"]) / sizes.rows
    filtered_row_s = (figures["plan"][3]["seconds"] - figures["plan"][1]["seconds"]) / sizes.rows
    list_figures, base = figures["lists"]["lists"], figures["plan"][0]["before_mb"]
    count = list_figures["items"]
    item_s = {name: figure["seconds"] / count for name, figure in list_figures.items() if name != "items"}
    driver_cpu_per_item = max(row["driver_cpu"] / row["items"] for row in figures["driver"][2:])
    from_packs = figures["lists"]["resume"][0]
    print("\n| | 100 million rows | 5 billion rows |\n|---|---|---|")
    totals = [rows // ROWS_PER_SHARD for rows in (100_000_000, 5_000_000_000)]
    lines = {
        "items": [f"{n:,}" for n in totals],
        "plan, bytes": [f"{n * list_figures['plan']['bytes'] / count / 1e6:,.1f} MB" for n in totals],
        "manifest, bytes": [f"{n * list_figures['manifest']['bytes'] / count / 1e6:,.1f} MB" for n in totals],
        "reading the list, no filter": [_time(n * ROWS_PER_SHARD * row_s) for n in totals],
        "reading the list, with a filter": [_time(n * ROWS_PER_SHARD * filtered_row_s) for n in totals],
        "driver CPU for the items": [_time(n * driver_cpu_per_item) for n in totals],
        "driver memory, at the most": [f"{base + n * (list_figures['resume']['peak_mb'] - base) / count:,.0f} MB"
                                       for n in totals],
        "manifest, written and loaded": [_time(n * (item_s["manifest"] + item_s["manifest, loaded"])) for n in totals],
        "resume, from packs on a disk": [_time(n * (item_s["resume"] + from_packs["seconds"] / from_packs["items"]))
                                         for n in totals],
        "requests to list the records on S3": [f"{-(-n // LISTED):,}" for n in totals],
        "requests to read packs when resuming": [f"{-(-n // 5000):,}" for n in totals],
    }
    for name, cells in lines.items():
        print(f"| {name} | {' | '.join(cells)} |")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    parser.add_argument("--only", nargs="+", choices=["plan", "driver", "workers", "lists"],
                        default=["plan", "driver", "workers", "lists"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--small", action="store_true", help="a hundredth of everything")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = photographs.work_folder(args.work)
    if args.part:
        name, settings = json.loads(args.part)
        print(json.dumps(PARTS[name](work, **settings)))
        return 0
    sizes = Sizes().small() if args.small else Sizes()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    measurements = {"plan": lambda: measure_planning(work, sizes),
                    "driver": lambda: measure_driver(work, sizes, args.workers),
                    "workers": lambda: measure_workers(work, sizes, args.workers),
                    "lists": lambda: measure_lists(work, sizes)}
    figures = {name: measurements[name]() for name in args.only}
    if {"plan", "driver", "lists"} <= figures.keys():
        print_extrapolation(figures, sizes)
    (work / "scale.json").write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
