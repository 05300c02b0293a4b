"""Takedowns: the list of requests to remove images, and the rows that searches skip because of it.

Input: requests by hash, URL or domain. Output: hidden rows of each version.
Start with takedown_list.py.
"""
