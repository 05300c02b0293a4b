"""Batches of images with their neighbors, for training and sampling.

Input: sealed shards and neighbor lists. Output: a dict of arrays for each step.
The batch of a step depends only on the seed and the step.
Start with batches.py.
"""
