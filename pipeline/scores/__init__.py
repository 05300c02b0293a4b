"""The stage `score`: a number for each sample from a small model.

Input: sealed shards and embeddings. Output: scores/NAME/000000.parquet, row i for sample i of the shard.
Row filters of `neighbors`, `index` and `rebuild` can use these columns.
Start with score.py.
"""
