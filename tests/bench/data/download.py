"""Images per second, memory, CPU and quality from a list of URLs to tars, compared with img2dataset.

    python tests/bench/data/download.py [--images 20000] [--repeats 3] [--work FOLDER]

Both read the same parquet list and download from the same web server (server.py). Both make the short side 256 pixels
long, and write JPEG 95 into tars of 1,000. img2dataset runs in two processes, with the number of threads that was best
on a short list, and otherwise with its defaults. The runs take turns; each begins with an empty folder. Prints a
Markdown table of medians; download.json in the work folder has every run. Exit 1 if an image is missing anywhere.
"""

import argparse
import io
import json
import shutil
import statistics
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, JpegImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
import server
from harness import Failed, Usage, environment, machine, measure, versions

PEER = "img2dataset==1.47.0"
SIZE, QUALITY, PER_SHARD, PROCESSES = 256, 95, 1000, 2
CONNECTIONS = 48  # a local server needs few; the default is for the web
_THREADS = (16, 32, 64, 128, 256)


@dataclass
class Result:
    """One run over the list."""

    who: str
    pictures: int
    wall_s: float
    work_s: float  # without start-up
    cpu_s: float
    peak_mb: float
    others_cores: float
    server_cpu_s: float


def write_list(path: Path, urls: list[str]) -> Path:
    """A parquet list of URLs with a caption each."""
    captions = [f"a photograph, number {number}" for number in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    return path


def peer(python: Path, source: Path, folder: Path, web: server.Running, threads: int) -> Result:
    """img2dataset over a list."""
    shutil.rmtree(folder, ignore_errors=True)
    before = web.cpu_seconds()
    usage = measure(
        [str(python.parent / "img2dataset"), f"--url_list={source}", "--input_format=parquet", "--url_col=url",
         "--caption_col=caption", f"--output_folder={folder}", "--output_format=webdataset", f"--image_size={SIZE}",
         "--resize_mode=keep_ratio", "--encode_format=jpg", f"--encode_quality={QUALITY}",
         f"--number_sample_per_shard={PER_SHARD}", f"--processes_count={PROCESSES}", f"--thread_count={threads}",
         "--compute_hash=sha256", "--enable_wandb=False"], folder.with_suffix(".log"), served=web.cpu_seconds)
    return _result(f"img2dataset, {threads} threads", usage, folder, web.cpu_seconds() - before)


def ours(source: Path, root: Path, web: server.Running, local: bool) -> Result:
    """The shard stage over a list, on Ray or in one process."""
    shutil.rmtree(root, ignore_errors=True)
    before = web.cpu_seconds()
    usage = measure(
        [sys.executable, "-m", "jobs", "shard", "bench", "--source", str(source), "--root", str(root), "--image-size",
         str(SIZE), "--resize", "keep_ratio", "--format", "jpg", "--quality", str(QUALITY), "--samples-per-shard",
         str(PER_SHARD), "--allow-hosts", web.address, "--connections", str(CONNECTIONS),
         *(["--local"] if local else ["--workers", str(PROCESSES)])],
        root.with_suffix(".log"), served=web.cpu_seconds)
    shards = root / "datasets" / "bench" / "v1" / "shards"
    who = "ours, --local" if local else f"ours, {PROCESSES} workers"
    return _result(who, usage, shards, web.cpu_seconds() - before)


def seconds_of_shards(folder: Path) -> float:
    """Seconds from the begin of the first shard to the end of the last; both write that beside each shard."""
    stats = [json.loads(path.read_text()) for path in folder.glob("*_stats.json")]
    return max(shard["end_time"] for shard in stats) - min(shard["start_time"] for shard in stats)


def _result(who: str, usage: Usage, folder: Path, served: float) -> Result:
    pictures = sum(pq.read_table(path, columns=["status"])["status"].to_pylist().count("success")
                   for path in folder.glob("*.parquet"))
    return Result(who, pictures, round(usage.wall_s, 2), round(seconds_of_shards(folder), 2), round(usage.cpu_s, 2),
                  round(usage.peak_mb, 1), round(usage.others_cores, 2), round(served, 2))


def pictures_of(folder: Path) -> dict[str, bytes]:
    """Every image of the tars of a folder by its key."""
    images = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    images[member.name.removesuffix(".jpg")] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return images


def quality(folder: Path, work: Path, pictures: int, sample: int = 200) -> dict[str, Any]:
    """Number of images in the tars, their mean bytes, and for a sample of them the distance to the reference.

    The reference is the image decoded at full size and resized to the same size, without a JPEG of it. Lanczos makes
    the first reference. Area averaging makes the second one, because img2dataset shrinks with it.
    """
    images, psnr, sampling = pictures_of(folder), {"LANCZOS": [], "BOX": []}, set()
    keys: dict[str, str] = {}
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path, columns=["url", "key", "status"]).to_pylist()
        keys |= {row["url"].rpartition("/")[2]: row["key"] for row in table if row["status"] == "success"}
    originals = photographs.make(work)
    wanted = range(0, pictures, max(1, pictures // sample))
    for number in list(wanted)[:sample]:
        image = Image.open(io.BytesIO(images[keys[f"{number:06d}.jpg"]]))
        sampling.add({0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}.get(JpegImagePlugin.get_sampling(image), "other"))
        original = Image.open(originals[number % len(originals)]).convert("RGB")
        for how, values in psnr.items():
            reference = original.resize(image.size, Image.Resampling[how])
            error = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
            values.append(10 * np.log10(255 ** 2 / np.mean(error ** 2)))
    return {"tars": len(images), "bytes": round(statistics.mean(len(data) for data in images.values())),
            "psnr_lanczos": round(float(np.mean(psnr["LANCZOS"])), 2),
            "psnr_area": round(float(np.mean(psnr["BOX"])), 2), "chroma": " ".join(sorted(sampling))}


def best_threads(python: Path, source: Path, work: Path, web: server.Running) -> int:
    """The number of threads with which img2dataset is fastest on a short list; of equals (3 %) the smallest, for
    threads cost memory."""
    speeds = {}
    for threads in _THREADS:
        result = peer(python, source, work / "peer", web, threads)
        speeds[threads] = result.pictures / result.work_s
        print(f"img2dataset with {threads} threads: {speeds[threads]:.1f} images/s, {result.peak_mb:.0f} MB",
              file=sys.stderr, flush=True)
    return min(threads for threads, speed in speeds.items() if speed > 0.97 * max(speeds.values()))


def table(results: list[Result], quality_by_who: dict[str, dict[str, Any]]) -> str:
    """Medians of the runs as a Markdown table, with lowest and highest speed; ratios are to the first column."""
    names = list(dict.fromkeys(result.who for result in results))
    lines: list[tuple[str, str, bool, Callable[[Result], float]]] = [
        ("images/s, whole command", ".1f", True, lambda result: result.pictures / result.wall_s),
        ("images/s, without start-up", ".1f", True, lambda result: result.pictures / result.work_s),
        ("start-up and end, s", ".1f", False, lambda result: result.wall_s - result.work_s),
        ("CPU ms an image", ".2f", True, lambda result: 1e3 * result.cpu_s / result.pictures),
        ("peak memory (PSS), MB", ".0f", True, lambda result: result.peak_mb),
        ("server's CPU ms an image", ".2f", False, lambda result: 1e3 * result.server_cpu_s / result.pictures),
        ("cores busy with something else", ".2f", False, lambda result: result.others_cores)]
    rows = [["", names[0], *(cell for name in names[1:] for cell in (name, "ratio"))]]
    rows.append(["---"] * len(rows[0]))
    for title, form, compared, value in lines:
        values = {name: sorted(value(result) for result in results if result.who == name) for name in names}
        medians = {name: statistics.median(values[name]) for name in names}
        cells = {name: f"{medians[name]:{form}}" for name in names}
        if "/s" in title:
            cells = {name: f"{cell} ({values[name][0]:{form}} to {values[name][-1]:{form}})"
                     for name, cell in cells.items()}
        ratios = {name: f"{medians[name] / medians[names[0]]:.2f}" if compared else "" for name in names}
        rows.append([title, cells[names[0]], *(cell for name in names[1:] for cell in (cells[name], ratios[name]))])
    for title, key in (("PSNR to Lanczos of the whole image, dB", "psnr_lanczos"),
                       ("PSNR to its area average, dB", "psnr_area"), ("mean bytes of a JPEG", "bytes"),
                       ("chroma", "chroma"), ("images in the tars", "tars")):
        base = quality_by_who[names[0]][key]
        row = [title, str(base)]
        for name in names[1:]:
            here = quality_by_who[name][key]
            ratio = f"{here - base:+.2f}" if "psnr" in key else f"{here / base:.2f}" if key == "bytes" else ""
            row += [str(here), ratio]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of img2dataset; default: the best on a short list")
    parser.add_argument("--no-keep-alive", action="store_true", help="the server closes a connection after one image")
    parser.add_argument("--only", choices=("peer", "ours"), help="leave the other out")
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    args = parser.parse_args()
    work = photographs.work_folder(args.work)
    python = environment(work, PEER.replace("==", "-"), PEER)
    results: list[Result] = []
    quality_by_who: dict[str, dict[str, Any]] = {}
    try:
        with server.running(work, keep_alive=not args.no_keep_alive) as web:
            whole = write_list(work / "list.parquet", [web.url(number) for number in range(args.images)])
            short = write_list(work / "short.parquet", [web.url(number) for number in range(min(args.images, 2000))])
            threads = args.threads
            if args.only != "ours":
                threads = threads or best_threads(python, short, work, web)
            runs: list[tuple[Path, Callable[[], Result]]] = []
            if args.only != "ours":
                runs.append((work / "peer", lambda: peer(python, whole, work / "peer", web, threads)))
            if args.only != "peer":
                root = work / "ours"
                shards = root / "datasets" / "bench" / "v1" / "shards"
                runs.append((shards, lambda: ours(whole, root, web, local=False)))
                runs.append((shards, lambda: ours(whole, root, web, local=True)))
            for _ in range(args.repeats):
                for folder, run in runs:
                    result = run()
                    results.append(result)
                    print(json.dumps(asdict(result)), file=sys.stderr, flush=True)
                    if result.who not in quality_by_who:
                        quality_by_who[result.who] = quality(folder, work, args.images)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    document = {"machine": machine(), "versions": versions(python), "list": args.images,
                "runs": [asdict(result) for result in results], "found": quality_by_who}
    (work / "download.json").write_text(json.dumps(document, indent=1))
    print(f"{args.images} images ({photographs.COUNT} different ones), {args.repeats} runs each in turns"
          f"{', no keep-alive' if args.no_keep_alive else ''}; {machine()}; {versions(python)}\n")
    print(table(results, quality_by_who))
    incomplete = [result for result in results if result.pictures != args.images]
    incomplete_tars = [who for who, numbers in quality_by_who.items() if numbers["tars"] != args.images]
    if incomplete or incomplete_tars:
        print(f"\nincomplete: {incomplete} {incomplete_tars}")
    return 1 if incomplete or incomplete_tars else 0


if __name__ == "__main__":
    raise SystemExit(main())
