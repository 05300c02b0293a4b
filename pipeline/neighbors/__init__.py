"""The nearest database rows of each sample, found exactly and written once.

Input: embeddings of a dataset, and the index of a database. Output: lists of rows for each shard.
Copies of a sample are left out of its own list.
Start with neighbors.py.
"""
