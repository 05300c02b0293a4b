"""The next version of a dataset: what changed in its source, what stays, and whether it may be published.

Input: a source, and the last version. Output: a new version that refers to the files that stayed.
Also reads sealed folders again and reports damage.
Start with source_diff.py.
"""
