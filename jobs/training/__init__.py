"""Training of a model: on Ray, on several processes, or in this one.

Input: a sealed dataset, neighbor lists and `TrainConfig`. Output: the folder of a run.
Also computes latents, and converts and exports weights.
Start with train_stage.py.
"""
