"""A dataset by name and version: its folders, its rows, and which version is published.

Input: `name@version` and sealed folders. Output: manifests, vectors and metadata by global row.
Also holds the rows that searches skip, and the list of takedowns.
Start with dataset.py.
"""
