"""The trackers of runs and stages: wandb, TensorBoard, MLflow.

Input: metrics, settings, images and the state of a run. Output: the files or the server of each tracker.
A stage computes the same with and without a tracker. A tracker that fails never stops it.
Start with trackers.py.
"""
