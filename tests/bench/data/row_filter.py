"""The row filter of `--where` on a long list, beside an older one, plain pyarrow and DuckDB: seconds and peak memory.

    python tests/bench/data/row_filter.py [--rows 10000000] [--repeats 5] [--old COMMIT:PATH] [--work FOLDER]

Each run is its own process with one thread. It has imported pyarrow, and ours also what `shard` imports
without a filter. Ours reads the list as the driver does: it prunes row groups, then reads batches of the columns that
the filter names. Plain pyarrow is the same loop with an expression written by hand, without pruning. DuckDB, if it is
installed, counts the rows by SQL. All must keep the same number of rows. Programs run in turns. Prints Markdown tables
of medians, and of the lowest and highest run.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_CHECKOUT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(_CHECKOUT), str(_CHECKOUT / "tests/bench")]

_ROW_GROUP = 100_000
_SEED = 0


@dataclass(frozen=True)
class Case:
    """One filter, in the form of each program."""

    name: str
    where: str
    arrow: pc.Expression
    sql: str
    batch: int = 1 << 16


_NUMBERS = Case("two numbers", "punsafe < 0.1 and AESTHETIC_SCORE > 5",
                (pc.field("punsafe") < 0.1) & (pc.field("AESTHETIC_SCORE") > 5.0),
                "punsafe < 0.1 AND AESTHETIC_SCORE > 5")
_MEMBERS = [97 * number for number in range(1000)]
CASES = {case.name: case for case in (
    _NUMBERS,
    Case("two numbers, batches of 1,024 rows", _NUMBERS.where, _NUMBERS.arrow, _NUMBERS.sql, 1024),
    Case("text and a calculation", "contains(TEXT, 'cat 1') and WIDTH / HEIGHT < 1.5",
         pc.match_substring(pc.field("TEXT"), "cat 1")
         & (pc.field("WIDTH").cast(pa.float64()) / pc.field("HEIGHT").cast(pa.float64()) < 1.5),
         "contains(TEXT, 'cat 1') AND WIDTH / HEIGHT < 1.5"),
    Case("a list of 1,000 numbers", f"hash in {_MEMBERS}", pc.field("hash").isin(pa.array(_MEMBERS)),
         f"hash IN ({', '.join(map(str, _MEMBERS))})"),
    Case("a sorted column", "position < 500000", pc.field("position") < 500_000, "position < 500000"),
    Case("a sorted column with nulls", "position_or_null < 500000", pc.field("position_or_null") < 500_000,
         "position_or_null < 500000"))}


def write_list(path: Path, rows: int) -> None:
    """A list like LAION's: some values are missing, or NaN."""
    random = np.random.default_rng(_SEED)
    hidden = path.with_suffix(".part")
    writer = None
    for first in range(0, rows, _ROW_GROUP):
        count = min(_ROW_GROUP, rows - first)
        position = np.arange(first, first + count)
        punsafe = random.random(count, np.float32)
        punsafe[random.random(count) < 0.01] = np.nan
        table = pa.table({
            "url": [f"https://example.com/{number}.jpg" for number in position],
            "TEXT": [f"an image of a cat {number}" for number in position],
            "punsafe": punsafe,
            "AESTHETIC_SCORE": pa.array(random.normal(5, 1, count), mask=random.random(count) < 0.01),
            "WIDTH": random.integers(100, 4000, count, np.int32), "HEIGHT": random.integers(100, 4000, count, np.int32),
            "hash": random.integers(0, 1 << 20, count),
            "position": position,
            "position_or_null": pa.array(position, mask=random.random(count) < 0.01)})
        writer = writer or pq.ParquetWriter(hidden, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer
    writer.close()
    hidden.rename(path)


def _batches(file: pq.ParquetFile, case: Case, columns: list[str], groups: list[int]) -> Iterator[pa.RecordBatch]:
    for group in groups:
        yield from file.iter_batches(case.batch, row_groups=[group], columns=columns, use_threads=False)


def _filter_class(source: str) -> Any:
    """The class of the row filter in a module: that of this checkout, or of an older file."""
    if not source:
        from pipeline.rows.row_filter import RowFilter
        return RowFilter
    specification = importlib.util.spec_from_file_location("older_filter", source)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["older_filter"] = module
    specification.loader.exec_module(module)
    return module.Where


def child(program: str, path: Path, case: Case, older: str) -> dict[str, float]:
    """Seconds in all, of CPU, and to load the filter; megabytes, rows kept, row groups read."""
    if program in {"before", "now"}:
        import pipeline.sources  # noqa: F401 - what `shard` has loaded with or without a filter
    begin, before, groups = time.perf_counter(), time.process_time(), 0
    if program == "DuckDB":
        import duckdb
        duckdb.execute("SET threads = 1")
        loaded = time.perf_counter()
        kept = duckdb.execute(f"SELECT count(*) FROM read_parquet('{path}') WHERE {case.sql}").fetchall()[0][0]
    elif program == "pyarrow":
        loaded = time.perf_counter()
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        columns = [name for name in file.schema_arrow.names if name in case.sql.split() or f"({name}," in case.sql]
        groups = file.num_row_groups
        kept = sum(batch.filter(case.arrow).num_rows for batch in _batches(file, case, columns, list(range(groups))))
    else:
        where = _filter_class(older if program == "before" else "").parse(case.where)
        loaded = time.perf_counter()
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        candidate_groups = where.row_groups(file)
        groups = len(candidate_groups)
        kept = sum(int(where.mask(pa.Table.from_batches([batch])).sum())
                   for batch in _batches(file, case, list(where.columns), candidate_groups))
    return {"load_s": loaded - begin, "kept": kept, "groups": groups,
            "seconds": time.perf_counter() - begin,
            "cpu_s": time.process_time() - before, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    # Not getrusage: its peak begins with that of the parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _run(program: str, path: Path, name: str, older: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", program, "--case", name, "--list", str(path), "--older", older]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _spread(runs: list[dict[str, float]], key: str, digits: int = 2) -> str:
    from harness import spread  # not for the children, whose memory is measured
    return spread([run[key] for run in runs], digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--old", default="bd228ec:pipeline/where.py", help="COMMIT:PATH of the filter to compare with")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "row-filter")
    for hidden in ("--child", "--case", "--list", "--older"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, Path(args.list), CASES[args.case], args.older)))
        return
    from harness import machine, versions  # not for the children, whose memory is measured
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / f"list-{args.rows}.parquet"
    if not path.exists():
        write_list(path, args.rows)
    shown = subprocess.run(["git", "-C", str(_CHECKOUT), "show", args.old], capture_output=True)
    older = args.work / "older_filter.py"
    older.write_bytes(shown.stdout)
    programs = [*([] if shown.returncode else ["before"]), "now", "pyarrow",
                *(["DuckDB"] if importlib.util.find_spec("duckdb") else [])]
    print(f"{args.rows:,} rows, {path.stat().st_size / 1e6:.0f} MB. {machine()}; {versions()}\n")
    print("| filter | program | seconds | CPU seconds | peak MB | rows kept | row groups read |")
    print("|---|---|---|---|---|---|---|")
    loads: dict[str, list[dict[str, float]]] = {program: [] for program in programs}
    for case in CASES.values():
        runs: dict[str, list[dict[str, float]]] = {program: [] for program in programs}
        for _ in range(args.repeats):
            for program in programs:
                runs[program].append(_run(program, path, case.name, str(older)))
        kept = {program: runs[program][0]["kept"] for program in programs}
        if len(set(kept.values())) > 1:
            raise SystemExit(f"{case.name}: different rows are kept: {kept}")
        for program in programs:
            loads[program] += runs[program]
            groups = f"{runs[program][0]['groups']:.0f}" if program != "DuckDB" else "-"
            cells = [case.name, program, _spread(runs[program], "seconds"), _spread(runs[program], "cpu_s"),
                     _spread(runs[program], "peak_mb", 0), f"{kept[program]:,.0f}", groups]
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\nSeconds of that to import the filter and to parse: " + "; ".join(
        f"{program} {_spread(runs, 'load_s')}" for program, runs in loads.items() if program != "pyarrow"))


if __name__ == "__main__":
    main()
