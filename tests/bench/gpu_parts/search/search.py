"""Exhaustive nearest-neighbor search: `pipeline.search.exhaustive` against the rate of a matrix product."""

import time
from typing import Any

import numpy as np
import torch
from gpu_parts.report import Report, lines_by_count, products_per_second, synchronizations

_DIM, _WANTED = 512, 100


def run(report: Report) -> None:
    """Search a database in files, compare with exact products, and time it."""
    from pipeline.neighbors.exhaustive import search_device, search_exhaustively
    rows, count = report.size(4_000_000, 20_000), report.size(65_536, 512)
    device, dtype = search_device()
    product_rate = products_per_second(device, dtype, report.size(8192, 512))
    report.figure("product of matrices", product_rate / 1e12, "TFLOP/s", str(dtype))
    database = _database(report, rows)
    queries = _unit(count, 7, report.device).float().cpu().numpy()
    with report.attempt("reading"):
        begun = time.perf_counter()
        total = sum(block.nbytes for _, block in database.blocks(1 << 18))
        read_rate = total / (time.perf_counter() - begun)
        report.figure("reading the database", read_rate / 1e9, "GB/s", "one thread, pages cached, checked for NaN")
    with report.attempt("ids and scores"):
        _compare(report, database, queries[:64])
    # Each search is compared with the time of the matrix product alone and of reading alone.
    for name, memory, query_count in (("default memory", 112 << 20, count // 8), ("8 GB", 8 << 30, count)):
        with report.attempt(f"search with {name}"):
            _time_search(report, database, queries[:query_count], memory, name, product_rate, read_rate)
    if report.device.type == "cuda":
        with report.attempt("waits"):
            first_rows = _View(database, 1 << 19)
            places = synchronizations(lambda: search_exhaustively(queries[:4096], first_rows, _WANTED, 8 << 30),
                                      report.device)
            report.figure("waits for the GPU in a search of 0.5 M rows", len(places), "", lines_by_count(places))


def _time_search(report: Report, database: Any, queries: np.ndarray, memory: int, name: str, product_rate: float,
                 read_rate: float) -> None:
    from pipeline.neighbors.exhaustive import search_exhaustively
    from pipeline.stages.timers import Times
    first_rows = _View(database, 1 << 18)
    search_exhaustively(queries[:256], first_rows, _WANTED, memory)  # loads kernels
    times = Times()
    begun = time.perf_counter()
    search_exhaustively(queries, database, _WANTED, memory, times)
    elapsed_s = time.perf_counter() - begun
    operations = 2.0 * len(queries) * len(database) * _DIM
    spent = ", ".join(f"{what} {seconds:.1f}" for what, seconds in times.pop_seconds().items())
    note = f"{len(queries)} queries, {elapsed_s:.1f} s; seconds: {spent}"
    report.speed(f"{name}: rate / product", operations / elapsed_s / product_rate, ">= 0.5", "", note)
    floor = max(operations / product_rate, 2.0 * len(database) * _DIM / read_rate)
    report.speed(f"{name}: floor of read and product / time", floor / elapsed_s, ">= 0.9", "", f"floor {floor:.2f} s")


def _compare(report: Report, database: Any, queries: np.ndarray) -> None:
    """Compare with float32 products of all rows on the device."""
    from pipeline.neighbors.exhaustive import search_exhaustively
    candidates = search_exhaustively(queries, database, _WANTED, 1 << 30)
    device_queries = torch.from_numpy(queries).to(report.device)
    values, ids = [], []
    torch.backends.cuda.matmul.allow_tf32 = False
    for first, block in database.blocks(1 << 18):
        products = device_queries @ torch.from_numpy(block).to(report.device).float().T
        best = products.topk(min(_WANTED, products.shape[1]), 1)
        values.append(best.values)
        ids.append(best.indices + first)
    exact_scores, places = torch.cat(values, 1).topk(_WANTED, 1)
    exact_ids = torch.cat(ids, 1).gather(1, places).cpu().numpy()
    overlap = np.mean([len(np.intersect1d(candidate_row, exact_row))
                       for candidate_row, exact_row in zip(candidates.ids, exact_ids, strict=True)])
    report.check("candidates that exact search has too", float(overlap) / _WANTED, ">= 0.98", "", "before re-ranking")
    largest_difference = np.abs(candidates.scores - exact_scores.cpu().numpy()).max()
    report.check("largest difference of a score", float(largest_difference), f"<= {candidates.off}", "",
                 "sorted scores; the stage ranks candidates again with exact products")


def _unit(count: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    # Clusters, because CLIP vectors are far from uniform.
    centers = torch.randn(1000, _DIM, device=device, generator=torch.Generator(device).manual_seed(1))
    which = torch.randint(1000, (count,), device=device, generator=generator)
    vectors = centers[which] + 0.8 * torch.randn(count, _DIM, device=device, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=1).half()


def _database(report: Report, rows: int) -> Any:
    """Embeddings in .npy files, as the embed stage writes them, without its manifest."""
    from pipeline.datasets.embeddings import Embeddings, map_array
    database, paths = Embeddings.__new__(Embeddings), []
    for number, first in enumerate(range(0, rows, 1_000_000)):
        path = report.scratch / f"{number:06}.npy"
        np.save(path, _unit(min(1_000_000, rows - first), 100 + number, report.device).cpu().numpy())
        paths.append(path)
    database.shards = [map_array(path) for path in paths]
    database.offsets = np.cumsum([0, *(len(shard) for shard in database.shards)])
    database.folder = str(report.scratch)
    return database


class _View:
    """The first rows of a database."""

    def __init__(self, database: Any, rows: int) -> None:
        self.database, self.rows, self.dim = database, rows, database.dim

    def blocks(self, rows: int) -> Any:
        for first, block in self.database.blocks(rows):
            if first >= self.rows:
                return
            yield first, block[:self.rows - first]


