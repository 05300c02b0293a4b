"""The stage that writes a corpus as tars with metadata.

Input: rows of a source. Output: one tar and one parquet file for each shard.
Also deduplicates shards, and adopts tars where they are.
Start with shard.py.
"""
