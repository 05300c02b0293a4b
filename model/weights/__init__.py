"""Weights on disk: checkpoints of runs, moving averages, CompVis's checkpoints, first stages.

Input: networks or files. Output: files or networks. Nothing is pickled.
A checkpoint holds whole tensors, whatever the number of processes.
Start with checkpoint.py.
"""
