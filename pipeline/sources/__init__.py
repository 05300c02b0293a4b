"""A corpus as rows: a folder of images, lists of URLs, tables with images, or tars.

Input: `ShardConfig.source`. Output: parts (on the driver) and their rows (on a worker).
A source holds only one part in memory, except for the file names of a folder.
Start with source.py.
"""
