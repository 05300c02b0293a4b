"""Answers of autofaiss for 210 datasets: the kinds of index it chooses, and its estimates of their sizes.

`python tests/pipeline/indices/golden/autofaiss_answers.py` writes autofaiss_answers.json. Do this only after an
intended change. The stored answers are those of autofaiss 2.18.0 with faiss 1.13.2 and numpy 1.26.4.
"""

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_suffix(".json")
COUNTS = (3_000, 10_000, 10_114, 60_000, 200_000, 1_000_000, 5_000_000, 20_000_000, 400_000_000, 2_000_000_000)
DIMS = (16, 96, 256, 512, 640, 768, 1024)
BYTES_PER_VECTOR = (288, 32)  # of the demo's recipe, and of a small budget


def budgets(count: int) -> list[int]:
    """Budgets in KiB, as the index stage passes them: its default of 4 GiB, and two budgets per vector."""
    return [4 << 20, *((bytes_per_vector * count + (64 << 10)) >> 10 for bytes_per_vector in BYTES_PER_VECTOR)]


def answers() -> list[dict[str, Any]]:
    """The answers of the installed autofaiss."""
    from autofaiss.external.metadata import IndexMetadata
    from autofaiss.external.optimize import get_optimal_index_keys_v2

    records = []
    for count in COUNTS:
        for dim in DIMS:
            for budget in budgets(count):
                keys = list(get_optimal_index_keys_v2(count, dim, f"{budget}K") or [])
                sizes = [int(IndexMetadata(key, count, dim).estimated_index_size_in_bytes()) for key in keys]
                records.append({"count": count, "dim": dim, "KiB": budget, "keys": keys, "bytes": sizes})
    return records


if __name__ == "__main__":
    PATH.write_text("[\n" + ",\n".join(json.dumps(answer) for answer in answers()) + "\n]\n")
