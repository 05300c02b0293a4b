"""Images per second from tars to CLIP embeddings, compared with clip-retrieval and with the bare forward pass.

    python tests/bench/search/embed.py [--model ViT-B-32|tiny-clip-64] [--images 1000] [--repeats 3] [--work FOLDER]

All use the same tars of JPEGs (short side 256) and the same weights (random ones for ViT-B-32, from a file). The bare
pass encodes batches of random pixels in memory, with the same precision. It is the better of two ways: torch's threads
share each batch, or each thread has its own. The rest of the time is reading, decoding, resizing and writing.
clip-retrieval has only fp32 on a CPU, so ours is shown in fp32 too; its number of loading processes is the better of 1
and 2. Prints a Markdown table of medians, the parts of our time, and the distance of the vectors. On a busy machine the
CPU seconds say more than the images a second.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
from harness import CHECKOUT, Failed, environment, machine, measure, versions

PEER = "clip-retrieval==2.45.0"
_WITH_PEER = ("torch==2.14.1", "torchvision==0.29.1", "faiss-cpu==1.13.2", "setuptools<81")
_BATCH = 128
_BATCHES = 4  # of the bare pass, over and over
_PEER = """
import sys
import time
import open_clip
from clip_retrieval.clip_inference.main import main
from clip_retrieval.clip_inference.mapper import ClipMapper

encode, used = ClipMapper.__call__, []

def counted(self, item):
    begun = time.process_time()
    found = encode(self, item)
    used.append(time.process_time() - begun)
    return found

ClipMapper.__call__ = counted

if __name__ == "__main__":
    tars, out, model, weights, config, workers, batch = sys.argv[1:]
    if config:
        open_clip.add_model_config(config)
    main(input_dataset=tars, output_folder=out, input_format="webdataset", batch_size=int(batch),
         num_prepro_workers=int(workers), enable_text=False, enable_metadata=False, use_jit=False,
         clip_model=f"open_clip:{model}/{weights}", distribution_strategy="sequential", output_partition_count=1)
    print(f"\\nused {sum(used)}\\n", flush=True)
"""


@dataclass
class Result:
    """One run over the tars."""

    who: str
    pictures: int
    wall_s: float
    work_s: float  # without start-up
    work_cpu_s: float  # without start-up; of clip-retrieval the forward pass alone
    cpu_s: float
    peak_mb: float
    others_cores: float
    times: dict[str, float] = field(default_factory=dict)


def make_shards(work: Path, count: int) -> Path:
    """A root with so many images in four shards under the name `photos`."""
    root = work / f"embed-{count}"
    if not (root / "datasets/photos/v1/shards/manifest.json").exists():
        source = photographs.fill_folder(work, count)
        subprocess.run([sys.executable, "-m", "jobs", "shard", "photos", "--source", str(source), "--root", str(root),
                        "--image-size", "256", "--resize", "keep_ratio", "--format", "jpg",
                        "--local", "--samples-per-shard", str(-(-count // 4))], cwd=CHECKOUT, check=True,
                       stdout=subprocess.DEVNULL)
    return root


def save_weights(model: str, work: Path) -> tuple[str, str]:
    """A file with the weights of a model, as torch.save writes it, and the folder of its configuration."""
    import torch
    from safetensors.torch import load_file

    # torch takes seconds, and most of this script's processes do without.
    from pipeline.embeddings.clip_weights import BUNDLED, BUNDLED_MODEL
    path = work / f"{model}.pt"
    if model == BUNDLED_MODEL:
        torch.save(load_file(BUNDLED / "tiny_clip.safetensors"), path)
        return str(path), str(BUNDLED)
    import open_clip
    if not path.exists():
        torch.manual_seed(0)
        torch.save(open_clip.create_model(model).state_dict(), path)
    return str(path), ""


def _run_bare_pass(model: str, weights: str, precision: str, pictures: int) -> None:
    """The forward pass over batches in memory; prints the seconds."""
    import torch

    from pipeline.embeddings import clip
    from pipeline.embeddings.clip_weights import BUNDLED_MODEL, ClipConfig
    if model == BUNDLED_MODEL:
        weights = "bundled"
    encoder = clip.load_encoder(ClipConfig(model, weights, precision))
    size = encoder.preprocessing["image_size"]
    batches = [torch.randn(_BATCH, 3, size, size).to(encoder.dtype).contiguous(memory_format=torch.channels_last)
               for _ in range(_BATCHES)]
    parts = [part for batch in batches for part in batch.split(_BATCH // 4)]

    def encode(batch: torch.Tensor) -> None:
        with torch.inference_mode():
            encoder.model.encode_image(batch)

    def timed(inputs: list[torch.Tensor], threads: int) -> tuple[float, float]:
        """Seconds and CPU seconds of several threads, each with a share of the threads of torch."""
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,)) as pool:
            list(pool.map(encode, inputs[:threads]))
            begin, used = time.perf_counter(), time.process_time()
            list(pool.map(encode, (inputs[number % len(inputs)] for number in range(pictures // len(inputs[0])))))
            return time.perf_counter() - begin, time.process_time() - used

    cores = os.cpu_count() or 1
    print(json.dumps(min(timed(batches, 1), timed(parts, cores))))


def measure_bare_pass(model: str, weights: str, precision: str, pictures: int, log: Path) -> Result:
    """The bare pass in a new process."""
    usage = measure([sys.executable, __file__, "--bare", precision, "--model", model, "--weights", weights,
                     "--images", str(pictures)], log)
    seconds, used = json.loads(usage.stdout.splitlines()[-1])
    return Result(f"bare forward pass, {precision}", pictures, usage.wall_s, seconds, used,
                  usage.cpu_s, usage.peak_mb, usage.others_cores)


def ours(root: Path, model: str, weights: str, precision: str) -> Result:
    """The embed stage; its vectors are left in the root."""
    shutil.rmtree(root / "datasets/photos/v1/embeddings", ignore_errors=True)
    usage = measure([sys.executable, "-m", "jobs", "embed", "photos", "--root", str(root), "--local", "--model", model,
                     "--pretrained", weights, "--precision", precision, "--batch-size", str(_BATCH)],
                    root / "ours.log")
    manifest = json.loads((root / "datasets/photos/v1/embeddings/manifest.json").read_text())
    times: Counter[str] = Counter()
    for record in manifest["items"]:
        times.update({name: value for name, value in record["run"]["times"].items() if isinstance(value, float)})
    return Result(f"embed --local, {precision}", manifest["totals"]["samples"], usage.wall_s,
                  sum(record["run"]["seconds"] for record in manifest["items"]), times["cpu"], usage.cpu_s,
                  usage.peak_mb, usage.others_cores, dict(times))


def peer(python: Path, root: Path, out: Path, model: str, weights: str, config: str, workers: int) -> Result:
    """clip-retrieval's inference over the same tars. It needs at least one tar for each loading process."""
    shutil.rmtree(out, ignore_errors=True)
    tars = sorted((root / "datasets/photos/v1/shards").glob("*.tar"))
    brace = str(tars[0].parent / f"{{000000..{len(tars) - 1:06d}}}.tar")
    script = out.with_suffix(".py")
    script.write_text(_PEER)
    usage = measure([str(python), str(script), brace, str(out), model, weights, config, str(workers), str(_BATCH)],
                    out.with_suffix(".log"))
    count = sum(len(np.load(path, mmap_mode="r")) for path in out.glob("img_emb/*.npy"))
    used = next(float(line.split()[1]) for line in usage.stdout.splitlines() if line.startswith("used "))
    stats = [json.loads(path.read_text()) for path in out.glob("stats/*.json")]
    work = sum(partition["total_duration"] for partition in stats)
    if not count or not work:
        raise Failed(f"clip-retrieval wrote {count} vectors: {out.with_suffix('.log')} tells why")
    return Result(f"clip-retrieval, fp32, {workers} loading", count, usage.wall_s, work,
                  used, usage.cpu_s, usage.peak_mb, usage.others_cores)


def least_cosine(root: Path, out: Path) -> float:
    """The least cosine between our vectors and the peer's; clip-retrieval's names are the keys."""
    import pyarrow.parquet as pq
    keys = [row["key"] for path in sorted((root / "datasets/photos/v1/shards").glob("*.parquet"))
            for row in pq.read_table(path, columns=["key", "status"]).to_pylist() if row["status"] == "success"]
    own_files = sorted((root / "datasets/photos/v1/embeddings").glob("*.npy"))
    own_vectors = np.concatenate([np.load(path) for path in own_files])
    all_peer_vectors = np.concatenate([np.load(path) for path in sorted(out.glob("img_emb/*.npy"))])
    names = [name for path in sorted(out.glob("metadata/*.parquet"))
             for name in pq.read_table(path)["image_path"].to_pylist()]
    row = {name: number for number, name in enumerate(names)}
    peer_vectors = all_peer_vectors[[row[key] for key in keys]].astype(np.float32)
    return float((peer_vectors * own_vectors.astype(np.float32)).sum(1).min())


def table(results: list[Result]) -> str:
    """Medians as a Markdown table."""
    names = list(dict.fromkeys(result.who for result in results))
    runs = {name: [result for result in results if result.who == name] for name in names}
    speed = {name: statistics.median(result.pictures / result.work_s for result in runs[name]) for name in names}
    theirs = next(speed[name] for name in names if name.startswith("clip-retrieval"))
    rows = [["", "images/s without start-up", "to clip-retrieval", "to the bare pass", "images/s, whole command",
             "CPU ms an image without start-up (clip-retrieval: forward pass alone)",
             "CPU ms an image, whole command", "peak memory (PSS), MB", "start-up and end, s",
             "cores busy with something else"], ["---"] * 10]
    for name in names:
        precision = "bf16" if "bf16" in name else "fp32"
        rows.append([name, f"{speed[name]:.1f}", f"{speed[name] / theirs:.2f}",
                     f"{speed[name] / speed[f'bare forward pass, {precision}']:.2f}",
                     f"{statistics.median(result.pictures / result.wall_s for result in runs[name]):.1f}",
                     f"{statistics.median(1e3 * result.work_cpu_s / result.pictures for result in runs[name]):.2f}",
                     f"{statistics.median(1e3 * result.cpu_s / result.pictures for result in runs[name]):.1f}",
                     f"{statistics.median(result.peak_mb for result in runs[name]):.0f}",
                     f"{statistics.median(result.wall_s - result.work_s for result in runs[name]):.1f}",
                     f"{statistics.median(result.others_cores for result in runs[name]):.1f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def time_per_image(results: list[Result]) -> str:
    """The parts of our time, in ms an image, summed over all threads."""
    lines = []
    for who in dict.fromkeys(result.who for result in results if result.times):
        runs = [result for result in results if result.who == who]
        lines.append(f"{who}: " + ", ".join(
            f"{name} {statistics.median(1e3 * result.times[name] / result.pictures for result in runs):.2f}"
            for name in sorted(runs[0].times)) + " ms a picture")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="ViT-B-32, tiny-clip-64, or any other of open_clip")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loading", type=int, default=0, help="of clip-retrieval's processes; default: the better")
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    parser.add_argument("--bare", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        _run_bare_pass(args.model, args.weights, args.bare, args.images)
        return 0
    work = photographs.work_folder(args.work)
    python = environment(work, PEER.replace("==", "-"), PEER, *_WITH_PEER)
    weights, config = save_weights(args.model, work)
    root, results, out = make_shards(work, args.images), [], work / "embed-peer"
    try:
        loading = args.loading or min((1, 2), key=lambda workers: peer(python, root, out, args.model, weights, config,
                                                                       workers).work_s)
        for _ in range(args.repeats):
            for precision in ("fp32", "bf16"):
                results.append(measure_bare_pass(args.model, weights, precision, args.images, work / "bare.log"))
            results.append(peer(python, root, out, args.model, weights, config, loading))
            min_cosine = {}
            for precision in ("fp32", "bf16"):
                results.append(ours(root, args.model, weights, precision))
                min_cosine[precision] = least_cosine(root, out)
            print(*results[-5:], sep="\n", file=sys.stderr, flush=True)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.model}, {args.images} images, {args.repeats} runs each in turns; {machine()}; "
          f"{versions()}; {PEER}\n\n{table(results)}\n\n{time_per_image(results)}\n"
          "least cosine to clip-retrieval's vectors: "
          + ", ".join(f"{precision} {value:.5f}" for precision, value in min_cosine.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
