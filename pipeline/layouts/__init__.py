"""Corpora with known columns or folders, and cells by paths and templates.

Input: the columns of a table, its first cells, or the names of a folder. Output: the layout, which is data.
A layout chooses only what the settings and the usual names leave open.
Start with known.py.
"""
