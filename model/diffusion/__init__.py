"""The diffusion process and its samplers.

Input: a denoiser, noise and a schedule. Output: training targets, or images.
Randomness depends on seed, purpose, step and position only.
Start with process.py, then samplers.py.
"""
