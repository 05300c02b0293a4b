"""Other programs read the files of this project, and this project reads theirs: with the real programs.

    python tests/bench/data/interop.py [--work FOLDER]

img2dataset downloads, the stages here continue from its folder. The shard stage downloads; webdataset, Ray Data and
clip-retrieval read its tars. A list with the columns of LAION's is taken as it is. Prints a table; exit 1 if anything
differs from what is expected.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
import server
from download import PEER
from harness import CHECKOUT, environment, machine, versions

CLIP_RETRIEVAL = "clip-retrieval==2.45.0"
_WITH_CLIP_RETRIEVAL = ("torch==2.14.1", "torchvision==0.29.1", "faiss-cpu==1.13.2", "setuptools<81")
_URLS, _MISSING = 200, 20

# Each gets tars as arguments and prints the keys of the samples it read.
_READERS = {
    "webdataset": """
import json, sys, webdataset
read = webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode("pil")
print(json.dumps([one["__key__"] for one in read if one["jpg"].width and one["json"]["key"] == one["__key__"]]))
""",
    "Ray Data": """
import json, sys, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
read = ray.data.read_webdataset(sys.argv[1:])
print(json.dumps([one["__key__"] for one in read.iter_rows() if one["jpg"].shape[2] == 3]))
""",
    "clip-retrieval": """
import json, sys, torch
from clip_retrieval.clip_inference.reader import WebdatasetReader
read = WebdatasetReader(lambda tars: tars, lambda image: torch.tensor([image.convert("RGB").width]),
                        lambda texts: torch.tensor([[len(text)] for text in texts]), sys.argv[1:], batch_size=64,
                        num_prepro_workers=0, enable_metadata=True)
print(json.dumps([key for batch in read for key in batch["image_filename"]]))
"""}


class Checks:
    """Expected and actual values."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, bool]] = []

    def equal(self, what: str, expected: Any, actual: Any) -> None:
        """Note a comparison."""
        self.rows.append((what, str(expected), str(actual).replace("|", "\\|"), expected == actual))
        print(f"{'ok' if expected == actual else 'FAULT'}: {what}: {actual}", file=sys.stderr, flush=True)

    def table(self) -> str:
        """All comparisons as a Markdown table."""
        rows = [(what, expected, actual if len(actual) < 200 else f"{actual[:197]}...", "ok" if good else "**fault**")
                for what, expected, actual, good in self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in [("check", "expected", "found", ""), ("---",) * 4, *rows])

    @property
    def faults(self) -> int:
        """The number of differences."""
        return sum(not good for *_, good in self.rows)


def _run(command: list[str]) -> tuple[str, str]:
    """The output of a command, and "exit 0" or its failure."""
    settings = os.environ | {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "RAY_USAGE_STATS_ENABLED": "0",
                             "WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings.pop("RAY_ADDRESS", None)
    ended = subprocess.run(command, cwd=CHECKOUT, env=settings, capture_output=True, text=True,
                           stdin=subprocess.DEVNULL, timeout=600)
    if ended.returncode == 0:
        return ended.stdout, "exit 0"
    return ended.stdout, f"exit {ended.returncode}: {' '.join(ended.stderr.splitlines()[-4:])}"


def _stage(checks: Checks, what: str, samples: int | None, *arguments: str) -> None:
    """Run a verb of this project in one process. It must succeed and report the number of samples."""
    stdout, ended = _run([sys.executable, "-m", "jobs", *arguments, *(["--local"] if samples is not None else [])])
    if ended != "exit 0" or samples is None:
        checks.equal(what, "exit 0", ended)
    else:
        checks.equal(what, f"{samples} samples", f"{json.loads(stdout.splitlines()[-1]).get('samples')} samples")


def _keys(folder: Path) -> list[str]:
    """Keys of the samples of a folder of shards, by its tables."""
    return [row["key"] for path in sorted(folder.glob("*.parquet"))
            for row in pq.read_table(path, columns=["key", "status"]).to_pylist() if row["status"] == "success"]


def adopted(checks: Checks, python: Path, work: Path, source: Path) -> None:
    """Run the stages on a folder of img2dataset."""
    folder, root = work / "interop-peer", str(work / "interop-adopted")
    for old in (folder, root):
        shutil.rmtree(old, ignore_errors=True)
    _, ended = _run([str(python.parent / "img2dataset"), f"--url_list={source}", "--input_format=parquet",
                     "--url_col=url", "--caption_col=caption", f"--output_folder={folder}",
                     "--output_format=webdataset", "--image_size=256", "--resize_mode=keep_ratio",
                     "--number_sample_per_shard=50", "--processes_count=1", "--thread_count=16"])
    checks.equal(f"{PEER}: downloads {_URLS} URLs, {_MISSING} of them missing", "exit 0", ended)
    good = _URLS - _MISSING
    checks.equal(f"{PEER}: pictures", good, len(_keys(folder)))
    _stage(checks, "shard --adopt of that folder", good, "shard", "adopted", "--adopt", "--source", str(folder),
           "--root", root)
    for verb in ("embed", "index", "neighbors"):
        _stage(checks, f"{verb} of what was adopted", good, verb, "adopted", "--root", root)
    _stage(checks, "verify of all that", None, "verify", "--root", root)


def read_by_others(checks: Checks, work: Path, source: Path, web: server.Running) -> None:
    """Other programs read the tars of the shard stage."""
    root = work / "interop-ours"
    shutil.rmtree(root, ignore_errors=True)
    _stage(checks, "shard of the same list", _URLS - _MISSING, "shard", "ours", "--source", str(source), "--root",
           str(root), "--image-size", "256", "--resize", "keep_ratio", "--format", "jpg", "--samples-per-shard", "50",
           "--allow-hosts", web.address)
    shards = root / "datasets" / "ours" / "v1" / "shards"
    keys = _keys(shards)
    tars = [str(path) for path in sorted(shards.glob("*.tar"))]
    checks.equal("keys of the tables, all different", _URLS - _MISSING, len(set(keys)))
    pythons = {"clip-retrieval": environment(work, CLIP_RETRIEVAL.replace("==", "-"), CLIP_RETRIEVAL,
                                             *_WITH_CLIP_RETRIEVAL)}
    for name, code in _READERS.items():
        stdout, ended = _run([str(pythons.get(name, sys.executable)), "-c", code, *tars])
        read_keys = json.loads(stdout.splitlines()[-1]) if ended == "exit 0" else []
        agrees = "the tables' keys" if sorted(read_keys) == sorted(keys) else "other keys"
        checks.equal(f"{CLIP_RETRIEVAL if name in pythons else name} reads the tars",
                     f"{len(keys)} samples, the tables' keys",
                     f"{len(read_keys)} samples, {agrees}" if ended == "exit 0" else ended)


def laion(checks: Checks, work: Path, web: server.Running) -> None:
    """A list with LAION's columns, without flags but its path and the allowed host."""
    source, root, count = work / "laion.parquet", work / "interop-laion", 100
    shutil.rmtree(root, ignore_errors=True)
    texts = [f"photograph {number}, as the web describes it" for number in range(count)]
    pq.write_table(pa.table({
        "URL": [web.url(number) for number in range(count)], "TEXT": texts,
        "WIDTH": pa.array([1400] * count, pa.int32()), "HEIGHT": pa.array([1000] * count, pa.int32()),
        "similarity": [0.3 + number / 1000 for number in range(count)],
        "hash": pa.array([(number - 50) * 7919 ** 4 for number in range(count)], pa.int64()),
        "punsafe": pa.array([1e-4] * count, pa.float32()), "pwatermark": pa.array([0.1] * count, pa.float32())}),
                   source)
    _stage(checks, "shard of a list with LAION's columns, no more flags", count, "shard", "laion", "--source",
           str(source), "--root", str(root), "--allow-hosts", web.address)
    shards = root / "datasets" / "laion" / "v1" / "shards"
    tables = [pq.read_table(path) for path in sorted(shards.glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    checks.equal("its captions, in order", True, [row["caption"] for row in rows] == texts)
    for column in ("similarity", "hash", "punsafe", "pwatermark"):
        checks.equal(f"its column {column} is carried along", True, bool(tables) and column in tables[0].column_names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    args = parser.parse_args()
    work = photographs.work_folder(args.work)
    python = environment(work, PEER.replace("==", "-"), PEER)
    checks = Checks()
    with server.running(work) as web:
        urls = [f"http://{web.address}/missing-{number}.jpg" if number % (_URLS // _MISSING) == 3 else web.url(number)
                for number in range(_URLS)]
        source = work / "interop.parquet"
        pq.write_table(pa.table({"url": urls, "caption": [f"photograph {number}" for number in range(_URLS)]}), source)
        adopted(checks, python, work, source)
        read_by_others(checks, work, source, web)
        laion(checks, work, web)
    print(f"{machine()}; {versions(python)}\n")
    print(checks.table())
    print(f"\n{len(checks.rows)} checks, {checks.faults} faults")
    return 1 if checks.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
