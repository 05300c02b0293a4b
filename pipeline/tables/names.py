"""Names of files of tables: their kind and their compression."""

COMPRESSIONS = (".gz", ".bz2", ".zst", ".xz", ".lz4")
TABLES = (".parquet", ".pq", *(f".{kind}{packed}" for kind in ("csv", "tsv", "jsonl", "ndjson")
                               for packed in ("", *COMPRESSIONS)))
"""Suffixes that only tables have."""
USUAL_TABLES = ".parquet, .csv, .tsv, .jsonl, .json, .txt"
"""The suffixes that messages name."""
LOOSE_TABLES = tuple(f".{kind}{packed}" for kind in ("txt", "json") for packed in ("", *COMPRESSIONS))
"""Suffixes that other files have too. In a folder they count as tables only if it has no file of `TABLES`."""


def table_kind(address: str) -> str:
    """The suffix of a name without that of its compression: parquet, csv, tsv, jsonl, ndjson, json or txt."""
    name = address.lower()
    for packed in COMPRESSIONS:
        name = name.removesuffix(packed)
    kind = name.rpartition(".")[2]
    return "parquet" if kind == "pq" else kind


def is_parquet(address: str) -> bool:
    """Whether a file is parquet, by its name."""
    return address.lower().endswith((".parquet", ".pq"))
