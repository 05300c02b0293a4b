"""The published version of a dataset: its release, its history, its signature, and the mark that protects it.

Input: sealed versions. Output: one swapped pointer that names a whole release.
Start with published.py.
"""
