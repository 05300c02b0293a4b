"""Embedding with CLIP: the rate of the bare forward pass, and the rates with transfers, decoding and tars.

The weights are random: they cost what trained ones cost.
"""

import io
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts.report import Report, lines_by_count, seconds, synchronizations
from PIL import Image

_DISTINCT = 48  # images that are encoded as JPEG; a tar repeats them


def run(report: Report) -> None:
    """Measure two encoders on pixels in memory, and the larger one on tars of JPEGs."""
    try:
        import open_clip  # noqa: F401
    except ImportError as error:
        report.skip("all of embed", f"{error}; pip install open_clip_torch")
        return
    large, small = ("ViT-B-32", "tiny-clip-64") if report.small else ("ViT-L-14", "ViT-B-32")
    batch = report.size(256, 16)
    for model in (large, small):
        with report.attempt(f"{model}"):
            encoder = _encoder(model)
            bare_rate = _on_pixels(report, encoder, model, batch)
            if model == large:
                _precision(report, encoder, model, batch)
            _on_tars(report, encoder, model, batch, bare_rate, gate=">= 0.9" if model == large else "")


def _encoder(model: str) -> Any:
    from pipeline.embeddings import clip
    from pipeline.embeddings.clip_weights import BUNDLED_MODEL, RANDOM, ClipConfig
    pretrained = "bundled" if model == BUNDLED_MODEL else RANDOM
    clip.load_encoder_on.cache_clear()
    return clip.load_encoder(ClipConfig(model=model, pretrained=pretrained))


def _on_pixels(report: Report, encoder: Any, model: str, batch: int) -> float:
    """Measure the bare pass and the steps around it. The rate of the bare pass, images a second."""
    from pipeline.embeddings.encode_shards import ShardPart, _in_whole_batches
    from pipeline.stages.timers import Times
    side = encoder.preprocessing["image_size"]
    count = report.size(10 if model == "ViT-L-14" else 24, 3)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (batch, side, side, 3), np.uint8) for _ in range(4)]
    device_pixels = torch.randn(batch, 3, side, side, device=report.device).to(
        encoder.dtype, memory_format=torch.channels_last)

    def bare_pass() -> None:
        with torch.inference_mode():
            for _ in range(count):
                encoder.model.encode_image(device_pixels)

    def launch_loop() -> None:
        previous = None
        for number in range(count):
            current = encoder.launch(pixels[number % 4], batch)
            if previous is not None:
                previous.cpu()
            previous = current
        previous.cpu()

    def encode_ready_pixels() -> None:
        source = (ShardPart(0, [""] * batch, [], list(range(batch)), pixels[number % 4]) for number in range(count))
        for _ in _in_whole_batches(encoder, source, batch, Times()):
            pass

    rate = batch * count / seconds(bare_pass, report.device, 3)
    report.figure(f"{model}: bare pass", rate, "images/s", f"batches of {batch} in {encoder.dtype}")
    for name, call, gate in (("launch loop", launch_loop, ">= 0.97"), ("ready pixels", encode_ready_pixels, ">= 0.95")):
        if name == "ready pixels" and not encoder.whole:
            report.skip(f"{model}: {name}", "a CPU takes parts of a shard")
            continue
        elapsed_s = seconds(call, report.device, 3)
        report.speed(f"{model}: {name} / bare pass", batch * count / elapsed_s / rate, gate, "",
                     f"{batch * count / elapsed_s:.0f} images/s")
    if report.device.type == "cuda":
        places = synchronizations(launch_loop, report.device)
        # One wait for the vectors of each batch is needed.
        report.check(f"{model}: waits for the GPU in a batch", len(places) / count, "<= 1", "", lines_by_count(places))
    return rate


def _precision(report: Report, encoder: Any, model: str, batch: int) -> None:
    """bf16 against fp32, and one image beside different batch mates."""
    from pipeline.embeddings import clip
    from pipeline.embeddings.clip_weights import RANDOM, ClipConfig
    side = encoder.preprocessing["image_size"]
    rng = np.random.default_rng(1)
    # Smooth images: noise of single pixels is unlike any photograph.
    coarse = torch.from_numpy(rng.uniform(0, 255, (batch, 3, 12, 12))).float()
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).byte()
    pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    vectors = encoder.images(pixels)
    config = ClipConfig(model=model, pretrained=RANDOM, precision="fp32")
    exact = clip.load_encoder_on.__wrapped__(config, False, encoder.device)
    exact.model.load_state_dict(encoder.model.state_dict())  # copies bf16 into fp32, exactly
    reference = exact.images(pixels[:report.size(128, 8)])
    cosine = (vectors[:len(reference)] * reference).sum(1).min()
    report.check(f"{model}: least cosine, bf16 to fp32", float(cosine), ">= 0.999", "",
                 f"{len(reference)} smooth images, random weights")
    mates = np.roll(pixels, 7, axis=0)
    again = encoder.images(mates)[7:8]
    if encoder.whole:
        report.expect(f"{model}: equal bits beside other images", bool((encoder.images(pixels)[0] == again[0]).all()),
                      "yes", "the same image at another place of another batch")


def _on_tars(report: Report, encoder: Any, model: str, batch: int, bare_rate: float, gate: str) -> None:
    for side in (256, 768) if gate else (256,):
        for threads in ((4, 16) if side == 256 and not report.small else (16,)):
            with report.attempt(f"{model}: JPEG tars of {side} px, {threads} threads"):
                rate, spent = _tars_rate(report, encoder, batch, bare_rate, side, threads)
                name = f"{model}: JPEGs of {side} px, {threads} threads / bare pass"
                note = f"{rate:.0f} images/s; thread seconds: {spent}"
                if gate and side == 256 and threads == 16:
                    report.speed(name, rate / bare_rate, gate, "", note)
                else:
                    report.figure(name, rate / bare_rate, "", note)


def _tars_rate(report: Report, encoder: Any, batch: int, bare_rate: float, side: int, threads: int
               ) -> tuple[float, str]:
    """Images a second of the embed stage's own loop, and the parts of its time."""
    from pipeline.embeddings.encode_shards import MemoryPlan, ShardInput, encode_parts
    from pipeline.stages.timers import Times
    tar, count = _tar(report, side)
    # About three seconds at the rate of the bare pass, or at that of decoding.
    rate = min(bare_rate, 4000.0 if side == 256 else 1000.0)
    shards = [ShardInput(count, lambda: tar.open("rb"))] * max(2, int(3 * rate / count))
    if report.small:
        shards = shards[:1]
    times, first, seen = Times(), 0, 0
    begun = time.perf_counter() if report.small else 0.0
    parts = encode_parts(encoder, shards, batch, MemoryPlan(min(threads, 16), 4 * threads), None, times)
    for part in parts:
        if not begun:  # the time to fill the queue is no part of a rate
            begun, first = time.perf_counter(), len(part.keys)
            continue
        seen += len(part.keys)
    rate = seen / max(time.perf_counter() - begun, 1e-9)
    assert seen + first == count * len(shards)
    spent = {name: round(duration, 1) for name, duration in times.pop_seconds().items()}
    return rate, ", ".join(f"{name} {duration}" for name, duration in spent.items())


def _tar(report: Report, side: int) -> tuple[Path, int]:
    from pipeline.media import tars
    path = report.scratch / f"{side}.tar"
    count = report.size(2048 if side == 256 else 1024, 64)
    if not path.exists():
        rng = np.random.default_rng(side)
        jpegs = [_jpeg(rng, side) for _ in range(_DISTINCT)]
        tars.write(path, ({"__key__": f"{number:08}", "jpg": jpeg}
                          for number, jpeg in zip(range(count), itertools.cycle(jpegs), strict=False)))
    return path, count


def _jpeg(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG whose length is about that of a photograph: structure at all scales."""
    total = np.zeros((side, side, 3))
    for cells in (4, 16, 64, 256):
        if cells > side:
            break
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += (np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), float) - 128) / cells ** 0.5
    image = Image.fromarray(np.clip(128 + 1.3 * total, 0, 255).astype(np.uint8))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()
