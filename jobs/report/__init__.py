"""The HTML report.

Purpose: show datasets, indices, samples, losses and evaluations of a root on one page.
Input: a root. Output: one HTML file that needs no other file.
First file to read: report.py.
"""
