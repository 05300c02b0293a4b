"""The nearest database rows of each sample, found exactly and written once.

Input: embeddings of a dataset, and the index of a database. Output: lists of rows for each shard.
The list of a sample does not contain copies of it.
Start with neighbors.py.
"""
