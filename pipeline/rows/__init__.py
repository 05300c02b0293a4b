"""A row of a source: its columns, its license, and the filter of `--where`.

Input: cells of a table, or of the files beside an image. Output: `Row` objects, as each kind of source makes them.
The names of columns that other programs write are here, so that all kinds of sources know the same ones.
Start with rows.py.
"""
