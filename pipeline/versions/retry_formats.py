"""Rows that failed because a package was missing, and that a rebuild tries again once the package is installed."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.dataset import Dataset
from pipeline.media.decode import NEEDS_FORMATS_EXTRA, installed_formats
from pipeline.versions.listing import LISTING_SCHEMA, map_in_order, read_listing, read_metadata, wide


def read_last_listing(last: Dataset | None) -> pa.Table:
    """The listing of the version before, empty without one.

    Images of formats that this machine did not decode then, and can decode now, match no row of a source. Only HEIC
    and JPEG XL need a package. Rows that failed for another reason stay as they are.
    """
    if last is None:
        return wide(LISTING_SCHEMA).empty_table()
    listing, messages = read_listing(last), [f"{NEEDS_FORMATS_EXTRA}: {detail}" for detail in installed_formats()]
    records = [record for record in last.manifest("shards")["items"] if NEEDS_FORMATS_EXTRA in record["skipped"]]
    if not messages or not records:
        return listing

    def failed_rows(record: dict[str, Any]) -> list[tuple[str, int]]:
        table = read_metadata(last, record, ["source_row", "error_message"])
        is_chosen = pc.is_in(table["error_message"], value_set=pa.array(messages, table["error_message"].type))
        return [(record["id"], row) for row in table["source_row"].filter(is_chosen).to_pylist()]

    failed = {row for rows in map_in_order(failed_rows, records) for row in rows}
    shards = pa.array([record["id"] for record in records], listing["shard"].type)
    positions = np.flatnonzero(pc.is_in(listing["shard"], value_set=shards).to_numpy())
    there = listing.select(["shard", "row"]).take(pa.array(positions))
    is_retried = np.zeros(listing.num_rows, bool)
    is_retried[positions] = [row in failed for row in zip(*(column.to_pylist() for column in there), strict=True)]
    marks = pc.if_else(pa.array(is_retried), pa.scalar("", listing["mark"].type), listing["mark"])
    return listing.set_column(listing.column_names.index("mark"), "mark", marks)
