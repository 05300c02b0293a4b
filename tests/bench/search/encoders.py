"""Encoders unchanged, with torch.compile, and with weights in channels-last order: images a second of a core.

    python tests/bench/search/encoders.py [--turns 7] [--passes 2] [--work FOLDER]

Measures ViT-B-32 with random weights and the tiny CLIP, in the default precision. Batches have 32 images of 8 bits, as
`embed` makes them on a CPU. All ways take turns. Prints medians, and the time of the first pass, in which torch.compile
compiles.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that all benchmarks share
import photographs
from embed import save_weights
from harness import machine

_BATCH = 32


def encoder_variants(model: str, weights: str) -> dict:
    """Encoders of equal weights: as loaded, compiled, channels last, and both."""
    import torch

    from pipeline.embeddings import clip
    from pipeline.embeddings.clip_weights import ClipConfig
    config, variants = ClipConfig(model, weights), {}
    for name, compiled, last in (("as it is", False, False), ("compiled", True, False),
                                 ("channels last", False, True), ("both", True, True)):
        clip.load_encoder_on.cache_clear()  # each way changes its weights, so it needs its own
        encoder = clip.load_encoder(config)
        if last:
            encoder.model.to(memory_format=torch.channels_last)
        encode = torch.compile(encoder.model.encode_image) if compiled else encoder.model.encode_image
        variants[name] = replace(encoder, encode=encode, compiled=compiled)
    return variants


def compare_encoders(model: str, weights: str, turns: int, passes: int) -> str:
    """A Markdown table of medians."""
    encoders = encoder_variants(model, weights)
    first_encoder = next(iter(encoders.values()))
    size = first_encoder.preprocessing["image_size"]
    batches = [np.random.default_rng(number).integers(0, 256, (_BATCH, size, size, 3), np.uint8)
               for number in range(passes)]
    first_s, speeds = {}, {name: [] for name in encoders}
    for name, encoder in encoders.items():
        begun = time.perf_counter()
        encoder.images(batches[0])
        first_s[name] = time.perf_counter() - begun
    for _ in range(turns):
        for name, encoder in encoders.items():
            begun, used = time.perf_counter(), time.process_time()
            for batch in batches:
                encoder.images(batch)
            speeds[name].append((passes * _BATCH / (time.perf_counter() - begun),
                                 passes * _BATCH / (time.process_time() - used)))
    lines = [f"{model}, {first_encoder.dtype}, {turns} turns of {passes} batches of {_BATCH}\n",
             "| way | images/s | to the first | images a CPU second | first pass, s |", "|---|--:|--:|--:|--:|"]
    clock = {name: statistics.median(rate for rate, _ in rates) for name, rates in speeds.items()}
    for name, rates in speeds.items():
        lines.append(f"| {name} | {clock[name]:.1f} ({min(rates)[0]:.1f} to {max(rates)[0]:.1f}) "
                     f"| {clock[name] / clock['as it is']:.2f} | {statistics.median(rate for _, rate in rates):.1f} "
                     f"| {first_s[name]:.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--work", default="", help="default: rdm-bench in the temporary folder")
    args = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    from pipeline.embeddings.clip_weights import BUNDLED_MODEL
    work = photographs.work_folder(args.work)
    print(f"{machine()}, one thread; torch {torch.__version__}")
    for model in ("ViT-B-32", BUNDLED_MODEL):
        weights = "bundled" if model == BUNDLED_MODEL else save_weights(model, work)[0]
        print(f"\n{compare_encoders(model, weights, args.turns, args.passes * (10 if weights == 'bundled' else 1))}",
              flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
