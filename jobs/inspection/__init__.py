"""The state of a root, read from its files alone.

Input: a root. Output: a table, a live table, or Prometheus series.
Needs no running driver.
Start with status.py.
"""
