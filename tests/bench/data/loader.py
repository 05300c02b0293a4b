"""Images per second from tars to batches of uint8, compared with bare webdataset over the same tars.

    python tests/bench/data/loader.py [--images 4000] [--batch 32] [--repeats 5] [--work FOLDER]

`shard` makes four tars of photographs: JPEGs of 256 x 256.

* webdataset reads and decodes them in their order and does nothing else. It does so with its own decoder (Pillow) and
  with ours, in a plain loop, or in batches by a DataLoader of two workers.
* Batches gives one epoch in its own order, with neighbors. One or two threads decode. Nothing is decoded before the
  clock starts, and only the last row of the table uses a cache of decoded images.

The time until the first images counts for Batches, and does not count for webdataset. All read from memory, as far as
the system caches files. The runs take turns. Prints a Markdown table of medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
from harness import CHECKOUT, Failed, machine, measure, versions

_TARS, _SIZE, _WORKERS, _K = 4, 256, 2, 4
_PLAIN, _LOADER = "webdataset, plain loop", f"webdataset, DataLoader of {_WORKERS} workers"


Run = tuple[int, float]
"""Images that were given, and how many of them a second."""


@dataclass
class Result:
    """One run over the tars."""

    who: str
    pictures: int
    pictures_s: float
    cpu_s: float  # with start-up
    peak_mb: float
    others_cores: float


def make_dataset(work: Path, count: int) -> Path:
    """A root with the dataset `photos` of the images, and their neighbors among themselves."""
    root = work / f"loader-{count}"
    for verb in (["shard", "photos", "--source", str(photographs.fill_folder(work, count)), "--image-size", str(_SIZE),
                  "--resize", "center_crop", "--format", "jpg", "--samples-per-shard", str(-(-count // _TARS))],
                 ["embed", "photos"],
                 ["neighbors", "photos", "--database", "photos", "--method", "exact", "--k", str(_K)]):
        subprocess.run([sys.executable, "-m", "jobs", *verb, "--root", str(root), "--local"], cwd=CHECKOUT, check=True,
                       stdout=subprocess.DEVNULL)
    return root


def _stream(root: Path, decoder: str) -> Any:
    """webdataset's own pipeline: the images of all tars, (256, 256, 3) uint8, in their order."""
    import webdataset

    from pipeline.media.resize import decode_pixels
    tars = [str(path) for path in sorted((root / "datasets/photos/v1/shards").glob("*.tar"))]
    dataset = webdataset.WebDataset(tars, shardshuffle=False)
    dataset = dataset.decode("rgb8") if decoder == "pillow" else dataset.map_dict(jpg=decode_pixels)
    return dataset.to_tuple("jpg").map(_first)


def _first(sample: tuple[Any]) -> Any:
    return sample[0]


def _in_turn(stream: Any, count: Callable[[Any], int]) -> Run:
    """The elements of a stream and their rate, without the time until the first one."""
    elements, later = iter(stream), 0
    first, begin = count(next(elements)), time.perf_counter()
    for element in elements:
        later += count(element)
    return first + later, later / (time.perf_counter() - begin)


def plain(root: Path, batch: int, decoder: str) -> Run:
    """webdataset in a loop, image by image."""
    return _in_turn(_stream(root, decoder), lambda picture: int(picture.shape == (_SIZE, _SIZE, 3)))


def loader(root: Path, batch: int, decoder: str) -> Run:
    """webdataset in processes that send batches."""
    import torch
    stream = _stream(root, decoder).batched(batch, partial=True)
    return _in_turn(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=_WORKERS), len)


def ours(root: Path, batch: int, threads: int, kept: bool) -> Run:
    """One epoch of Batches. `kept`: the second epoch, whose images the first one decoded."""
    from pipeline.batches.batches import Batches
    from pipeline.datasets.dataset import Dataset
    photos = Dataset.parse(str(root), "photos")
    batches = Batches(photos, photos, k=_K, global_batch=batch, seed=0, threads=threads,
                      decoded_bytes=1 << 40 if kept else 0)
    steps = int(batches.offsets[-1]) // batch
    first = steps + 1 if kept else 0
    for step in range(first):
        batches.at(step)
    begin = time.perf_counter()
    pictures = sum(len(batches.at(step)["image"]) for step in range(first, first + steps))
    return pictures, pictures / (time.perf_counter() - begin)


CONTESTANTS: dict[str, Callable[[Path, int], Run]] = {
    _PLAIN: partial(plain, decoder="pillow"),
    f"{_PLAIN}, our decoder": partial(plain, decoder="ours"),
    "Batches, 1 thread": partial(ours, threads=1, kept=False),
    _LOADER: partial(loader, decoder="pillow"),
    f"{_LOADER}, our decoder": partial(loader, decoder="ours"),
    "Batches, 2 threads": partial(ours, threads=2, kept=False),
    "Batches, a second epoch, kept decoded": partial(ours, threads=2, kept=True),
}


def _run(who: str, root: Path, batch: int) -> None:
    """One contestant in this process; prints what it did."""
    pictures, speed = CONTESTANTS[who](root, batch)
    print(json.dumps({"pictures": pictures, "pictures_s": speed}))


def _result(who: str, root: Path, batch: int, log: Path) -> Result:
    usage = measure([sys.executable, __file__, "--run", who, "--root", str(root), "--batch", str(batch)], log)
    summary = json.loads(usage.stdout.splitlines()[-1])
    return Result(who, summary["pictures"], summary["pictures_s"], usage.cpu_s, usage.peak_mb, usage.others_cores)


def table(results: list[Result]) -> str:
    """Medians as a Markdown table; ratios of speeds are to bare webdataset in the same turn."""
    names = list(dict.fromkeys(result.who for result in results))
    runs = {name: [result for result in results if result.who == name] for name in names}

    def speed_ratio(name: str, other: str) -> str:
        # Ratios are taken turn by turn, because other load on the machine changes.
        pairs = zip(runs[name], runs[other], strict=True)
        return f"{statistics.median(result.pictures_s / baseline.pictures_s for result, baseline in pairs):.2f}"

    rows = [["", "images/s", "to the plain loop", f"to the DataLoader of {_WORKERS}", "CPU s with start-up",
             "peak memory (PSS), MB", "cores busy with something else"], ["---"] * 7]
    for name in names:
        rows.append([name, f"{statistics.median(result.pictures_s for result in runs[name]):.0f}",
                     speed_ratio(name, _PLAIN), speed_ratio(name, _LOADER),
                     f"{statistics.median(result.cpu_s for result in runs[name]):.1f}",
                     f"{statistics.median(result.peak_mb for result in runs[name]):.0f}",
                     f"{statistics.median(result.others_cores for result in runs[name]):.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    parser.add_argument("--root", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        _run(args.run, Path(args.root), args.batch)
        return 0
    work, results = photographs.work_folder(args.work), []
    try:
        root = make_dataset(work, args.images)
        for _ in range(args.repeats):
            for who in CONTESTANTS:
                results.append(_result(who, root, args.batch, work / "loader.log"))
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"{args.images} images, batches of {args.batch}, {args.repeats} runs each in turns; {machine()}; "
          f"{versions()}\n")
    print(table(results))
    # The last batch of an epoch also has rows of the next epoch, so it does not count.
    incomplete = [result for result in results if result.pictures < args.images - args.batch + 1]
    if incomplete:
        print(f"\nincomplete: {incomplete}")
    return 1 if incomplete else 0


if __name__ == "__main__":
    raise SystemExit(main())
