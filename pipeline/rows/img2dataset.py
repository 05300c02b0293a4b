"""Tables that img2dataset writes beside its images, and what they say of rows without an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.compute as pc

from pipeline.tables.parquet_tables import open_parquet

STATUS, SUCCESS = "status", "success"
_COLUMNS = {"key", STATUS, "error_message", "original_width", "original_height"}


def is_output(names: Iterable[str]) -> bool:
    """Whether a table with these columns is output of img2dataset, where each row has a status.

    Its hash column, sha256 unless it was run otherwise, is that of the downloaded bytes. The images that it stores are
    resized and encoded again, so their hashes differ.
    """
    return set(names) >= _COLUMNS


def earlier_failure(cells: Mapping[str, Any]) -> str:
    """The reason why a row has no image, "" if it has one or its status is unknown."""
    status, message = cells.get(STATUS), cells.get("error_message")
    if not isinstance(status, str) or status == SUCCESS:
        return ""
    return f"{status}: {message}" if message else status


def count_failures(address: str) -> int:
    """How many rows of a parquet file have no image because img2dataset could not get it; 0 for other tables."""
    counts = count_rows(address)
    return counts[1] if counts else 0


def count_rows(address: str) -> tuple[int, int] | None:
    """The rows of a parquet file with an image and without one; None if there is no file, or a table of others."""
    try:
        with open_parquet(address) as file:
            if not is_output(file.schema_arrow.names):
                return None
            column = file.read([STATUS], use_threads=False)[STATUS]
    except FileNotFoundError:
        return None
    good = int(pc.sum(pc.equal(column, SUCCESS)).as_py() or 0)
    return good, len(column) - good
