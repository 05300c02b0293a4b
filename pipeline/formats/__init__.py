"""Formats of files and of numbers in settings.

Input: local files, streams of bytes, sizes as text. Output: arrays, tables, decompressed bytes, numbers of bytes.
Nothing here knows where a file comes from.
Start with arrays.py.
"""
