"""Estimates of time, money and storage.

Input: settings and measured rates. Output: a table with one line for each stage.
Rates come from manifests of earlier runs, or from a short benchmark.
Start with plan_table.py.
"""
