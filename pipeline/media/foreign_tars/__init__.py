"""Tars that other tools wrote: joined, damaged, compressed, with members in any order.

Input: a tar. Output: its samples, and everything that is wrong with it.
All headers are read before any content. Memory is bounded whatever the headers say.
Start with samples.py.
"""
