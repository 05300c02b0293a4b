"""Compressed nearest-neighbor indices: choose, train, fill, merge, tune, extend, search.

Input: embeddings of a dataset. Output: one faiss index, its size and its measured recall.
Equal vectors give equal bytes, for any number of threads and workers.
Start with choose.py, then index.py.
"""
