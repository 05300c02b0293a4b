"""The denoising network.

Input: noisy images (B, C, H, W), timesteps and neighbor vectors (B, k, D). Output: a prediction (B, C, H, W).
Names and shapes of the weights are those of the published checkpoints.
Start with unet.py.
"""
