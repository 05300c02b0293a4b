"""Files of tables as rows of plain cells: CSV, TSV, JSON, lists of URLs, parquet.

Input: the URL of a file, or an Arrow table. Output: `TableRow` objects, which name what is wrong.
Plain cells are None, bool, int, float, str and bytes. docs/reference/arrow-types.md has the rule for each Arrow type.
A reader of text holds one row in memory, a reader of parquet one batch.
Start with text_tables.py.
"""
