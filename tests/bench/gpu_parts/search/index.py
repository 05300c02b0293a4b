"""Training and filling an index: `pipeline.index` with the faiss that is installed, against one CPU core.

The stage's own GPU path needs faiss-gpu. The last rows show what torch alone does on the card for the same work, as a
reference for a path without faiss.
"""

import time

import torch
from gpu_parts.report import Report, wait

_DIM = 512


def run(report: Report) -> None:
    """Build one index, and time k-means on the device and on one core."""
    try:
        import faiss
    except ImportError as error:
        report.skip("the index stage", f"{error}; pip install faiss-gpu")
    else:
        with report.attempt("the index stage"):
            _stage(report, getattr(faiss, "get_num_gpus", lambda: 0)())
    with report.attempt("k-means with torch"):
        _k_means(report)


def _stage(report: Report, cards: int) -> None:
    from pipeline.indices import index
    from pipeline.indices.config import IndexConfig
    count = report.size(500_000, 5_000)
    vectors = _vectors(count, torch.device("cpu")).numpy()
    config = IndexConfig(key=f"IVF{report.size(4096, 64)},SQ8", queries=report.size(1000, 50))
    begun = time.perf_counter()
    info = index.build_whole(vectors, config)[2]
    elapsed_s = time.perf_counter() - begun
    report.figure("index stage", elapsed_s, "s", f"{count} vectors, {cards} GPUs in faiss, recall@10 "
                                                 f"{info['recall_at_10']}")
    if not cards and not report.small:
        report.fail("the index stage on the card", "this faiss has no GPU, and the stage has no other GPU path")


def _k_means(report: Report) -> None:
    """Seconds of k-means steps, and of assigning rows to lists: the card against one core."""
    lists, rows, core_rows = report.size(4096, 64), report.size(1_000_000, 4_000), report.size(8_192, 2_000)
    vectors = _vectors(rows, report.device)
    centers = vectors[:lists].clone()
    _step(vectors, centers)
    wait(report.device)
    begun = time.perf_counter()
    for _ in range(5):
        centers = _step(vectors, centers)
    wait(report.device)
    device_rate = rows * 5 / (time.perf_counter() - begun)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        host_vectors, host_centers = vectors[:core_rows].cpu(), centers.cpu()
        begun = time.perf_counter()
        _step(host_vectors, host_centers)
        core_rate = core_rows / (time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    report.figure("torch k-means step", device_rate / 1e6, "M rows/s", f"{lists} lists, {_DIM} dimensions, fp32")
    report.figure("torch k-means step / one core", device_rate / core_rate, "x", "reference: not part of the stage yet")
    agreement = (_nearest(vectors[:core_rows], centers).cpu() == _nearest(host_vectors, centers.cpu())).float().mean()
    report.check("rows in the same list as on the CPU", float(agreement), ">= 0.999")


def _step(vectors: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    nearest = _nearest(vectors, centers)
    sums = torch.zeros_like(centers).index_add_(0, nearest, vectors)
    counts = torch.bincount(nearest, minlength=len(centers)).clamp(min=1)
    return torch.nn.functional.normalize(sums / counts[:, None], dim=1)


def _nearest(vectors: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    return torch.cat([(part @ centers.T).argmax(1) for part in vectors.split(1 << 16)])


def _vectors(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    centers = torch.randn(1000, _DIM, device=device, generator=generator)
    which = torch.randint(1000, (count,), device=device, generator=generator)
    noise = torch.randn(count, _DIM, device=device, generator=generator)
    return torch.nn.functional.normalize(centers[which] + 0.8 * noise, dim=1)


