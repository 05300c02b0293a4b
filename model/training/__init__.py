"""Training: one step, all steps, precision and cost.

Input: batches by step. Output: checkpoints and metrics.
The number of processes does not change the result.
Start with train.py.
"""
