"""Reports of a running stage: logs, progress, Ray metrics, trackers.

Input: tallies of a stage, metrics of a run. Output: lines, bars, series.
A stage computes the same with and without it.
Start with observe.py.
"""
