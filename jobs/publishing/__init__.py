"""Versions that readers use: rebuild, check, publish, roll back, delete.

Input: a source that changed. Output: a new published version, or the reason why not.
Also credits and takedowns.
Start with rebuild.py.
"""
