"""What training and sampling read: batches of images with their neighbors.

Input: sealed shards and neighbor lists. Output: a dict of arrays for each step.
The batch of a step depends only on the seed and the step.
Start with batches.py.
"""
