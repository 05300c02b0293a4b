"""Checks of a command before its first stage: all of them run, and all failures are listed together.

Input: settings, what lies below the root, this machine. Output: nothing, or one error with every failure.
A check takes seconds at most, writes nothing, and never refuses what would work.
Start with check.py.
"""
