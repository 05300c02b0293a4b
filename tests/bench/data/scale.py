"""What a billion rows cost the driver: planning, items, manifests and going on, measured at up to ten million.

    python tests/bench/data/scale.py [--small] [--only plan driver workers lists] [--work FOLDER]

Each measurement runs in a process of its own, so that its peak of memory is its own. Prints Markdown tables, and from
the measured constants a table for 100 million and 5 billion rows. --small takes a hundredth of everything, to see that
it runs. Everything is in scale.json in the work folder.
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
    """How much of everything."""

    rows: int = 10_000_000
    few: int = 10_000
    csv: int = 1_000_000
    trivial: int = 10_000
    pictures: int = 2000
    items: int = 1_000_000
    recorded: int = 100_000

    def small(self) -> "Sizes":
        return Sizes(*(max(value // 100, 200) for value in self.__dict__.values()))


def measured(part: str, work: Path, **given: Any) -> dict[str, Any]:
    """What a part of this script says in a process of its own."""
    print(f"{part} {given} ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, __file__, "--part", json.dumps([part, given]), "--work", str(work)],
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def planning(work: Path, sizes: Sizes) -> list[dict[str, Any]]:
    long, few = (write_laion_list(work / f"laion-{count}.parquet", count) for count in (sizes.rows, sizes.few))
    table = write_laion_list(work / f"laion-{sizes.csv}.csv", sizes.csv)
    found = [measured("plan", work, source=str(source), rows=rows, where=where)
             for source, rows, where in ((few, sizes.few, ""), (few, sizes.few, WHERE), (long, sizes.rows, ""),
                                         (long, sizes.rows, WHERE), (table, sizes.csv, ""))]
    print("\n| list | rows | filter | file | items | seconds | peak memory | plan |\n|---|---|---|---|---|---|---|---|")
    for one, source in zip(found, (few, few, long, long, table), strict=True):
        print(f"| {source.suffix[1:]} | {one['rows']:,} | {one['where'] or 'none'} "
              f"| {source.stat().st_size / 1e6:,.1f} MB | {one['items']:,} | {one['seconds']:.2f} "
              f"| {one['peak_mb']:.0f} MB, {one['before_mb']:.0f} MB of it before "
              f"| {one['plan_bytes'] / 1e6:,.3f} MB |")
    return found


def driving(work: Path, sizes: Sizes, workers: list[int]) -> list[dict[str, Any]]:
    found = [measured("driver", work, items=items, workers=count) for items, count in (
        (sizes.trivial, 0), (4 * sizes.trivial, 0), *((sizes.trivial, count) for count in workers))]
    print("\n| trivial items | workers | items/s | driver CPU an item | driver memory grew by |\n|---|---|---|---|---|")
    for one in found:
        print(f"| {one['items']:,} | {one['workers'] or 'in process'} | {one['items'] / one['seconds']:,.0f} "
              f"| {one['driver_cpu'] / one['items'] * 1e3:.2f} ms | {one['driver_mb']:,.0f} MB |")
    print(f"\nAll on the {os.cpu_count()} cores of one machine: more workers than that share them. In process the "
          f"driver is the worker too.")
    return found


def working(work: Path, sizes: Sizes, workers: list[int]) -> list[dict[str, Any]]:
    found = [measured("shard", work, pictures=sizes.pictures, workers=count) for count in workers]
    print("\n| pictures | workers, each a node | pictures/s |\n|---|---|---|")
    for one in found:
        print(f"| {one['pictures']:,} | {one['workers']} | {one['pictures'] / one['seconds']:,.0f} |")
    return found


def listing(work: Path, sizes: Sizes) -> dict[str, Any]:
    found = {"lists": measured("lists", work, items=sizes.items),
             "resume": [measured("resume", work, items=sizes.recorded, how=how) for how in ("packs", "files")]}
    print(f"\n| of {found['lists']['items']:,} items | seconds | bytes | peak memory so far |\n|---|---|---|---|")
    for name, one in found["lists"].items():
        if name != "items":
            length = f"{one['bytes']:,}" if "bytes" in one else ""
            print(f"| {name} | {one['seconds']:.1f} | {length} | {one['peak_mb']:,.0f} MB |")
    print("\n| records there | from | seconds | memory |\n|---|---|---|---|")
    for one in found["resume"]:
        print(f"| {one['items']:,} | {one['from']} | {one['seconds']:.2f} | {one['mb']:.0f} MB |")
    return found


def extrapolated(found: dict[str, Any], sizes: Sizes) -> None:
    """What 100 million and 5 billion rows would cost, by the constants measured."""
    per_row = (found["plan"][2]["seconds"] - found["plan"][0]["seconds"]) / sizes.rows
    filtered = (found["plan"][3]["seconds"] - found["plan"][1]["seconds"]) / sizes.rows
    at_all, base = found["lists"]["lists"], found["plan"][0]["before_mb"]
    count = at_all["items"]
    each = {name: one["seconds"] / count for name, one in at_all.items() if name != "items"}
    busiest = max(one["driver_cpu"] / one["items"] for one in found["driver"][2:])
    packed = found["lists"]["resume"][0]
    print("\n| | 100 million rows | 5 billion rows |\n|---|---|---|")
    totals = [rows // ROWS_PER_SHARD for rows in (100_000_000, 5_000_000_000)]
    lines = {
        "items": [f"{n:,}" for n in totals],
        "plan, bytes": [f"{n * at_all['plan']['bytes'] / count / 1e6:,.1f} MB" for n in totals],
        "manifest, bytes": [f"{n * at_all['manifest']['bytes'] / count / 1e6:,.1f} MB" for n in totals],
        "reading the list, no filter": [_time(n * ROWS_PER_SHARD * per_row) for n in totals],
        "reading the list, with a filter": [_time(n * ROWS_PER_SHARD * filtered) for n in totals],
        "driver CPU for the items": [_time(n * busiest) for n in totals],
        "driver memory, at the most": [f"{base + n * (at_all['going on']['peak_mb'] - base) / count:,.0f} MB"
                                       for n in totals],
        "manifest, written and loaded": [_time(n * (each["manifest"] + each["manifest, loaded"])) for n in totals],
        "going on, from packs on a disk": [_time(n * (each["going on"] + packed["seconds"] / packed["items"]))
                                           for n in totals],
        "requests to list the records on S3": [f"{-(-n // LISTED):,}" for n in totals],
        "requests to read packs when going on": [f"{-(-n // 5000):,}" for n in totals],
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
    given = parser.parse_args()
    work = photographs.work_folder(given.work)
    if given.part:
        name, settings = json.loads(given.part)
        print(json.dumps(PARTS[name](work, **settings)))
        return 0
    sizes = Sizes().small() if given.small else Sizes()
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    makers = {"plan": lambda: planning(work, sizes), "driver": lambda: driving(work, sizes, given.workers),
              "workers": lambda: working(work, sizes, given.workers), "lists": lambda: listing(work, sizes)}
    found = {name: makers[name]() for name in given.only}
    if {"plan", "driver", "lists"} <= found.keys():
        extrapolated(found, sizes)
    (work / "scale.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
