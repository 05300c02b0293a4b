"""The folder of a training run.

Input: a root and the name of a run. Output: its settings, checkpoints and metrics.
Also holds the labels that logs and metrics share.
Start with run.py.
"""
