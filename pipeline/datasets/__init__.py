"""A dataset by name and version: its folders and its rows.

Input: `name@version` and sealed folders. Output: manifests, vectors and metadata by global row.
Start with dataset.py.
"""
