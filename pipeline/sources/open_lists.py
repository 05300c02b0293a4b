"""Open the files of a list as the source for their kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.sources.lists import ListSource
from pipeline.sources.parquet_lists import ParquetLists
from pipeline.sources.text_lists import TextLists
from pipeline.tables.names import is_parquet, table_kind

if TYPE_CHECKING:
    from pipeline.sources.config import ShardConfig


def open_lists(config: ShardConfig, addresses: list[str]) -> ListSource:
    """The source of the files of a list."""
    texts = [address for address in addresses if not is_parquet(address)]
    if texts and len(texts) < len(addresses):
        raise ValueError("parquet and text lists in one source\nhint: make a dataset of each")
    headless = [address for address in addresses if table_kind(address) in {"csv", "tsv", "txt"}]
    if config.columns and len(headless) < len(addresses):
        raise ValueError(f"--columns names the columns of CSV, TSV and .txt files without a header, and "
                         f"{addresses[0]} is none\nhint: --url-column and --caption-column choose among its columns")
    return TextLists(config, addresses) if texts else ParquetLists(config, addresses)
