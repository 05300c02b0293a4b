"""The names of rows for people: the caption, or the file that an image came from."""

from collections.abc import Iterable

from pipeline.datasets.dataset import Dataset, file_of
from pipeline.datasets.lookup import row_name
from pipeline.datasets.metadata import metadata

MOST_SEARCHED_BYTES = 64 << 20
"""Bytes of metadata that are searched for captions or keys, per dataset."""


def names_of_keys(dataset: Dataset, keys: Iterable[str]) -> dict[str, str]:
    """The names of the rows with these keys, as far as the searched metadata have them."""
    wanted, names = set(keys), dict[str, str]()
    budget, row = MOST_SEARCHED_BYTES, 0
    for record in dataset.manifest("shards")["items"]:
        budget -= file_of(record, ".parquet")["bytes"]
        if budget < 0 or not wanted:
            break
        for place, entry in enumerate(metadata(dataset, record, ["key", "caption", "url"]), row):
            if entry["key"] in wanted:
                wanted.discard(entry["key"])
                names[entry["key"]] = row_name(entry["caption"] or "", entry.get("url") or "", place)
        row += record["samples"]
    return names
