"""The retrieval-augmented diffusion model: from batches to a denoiser, from noise to images. Needs torch, not Ray.

A folder imports only from folders below it in this list (`make lint` checks it).

    style_classifier.py   names the style of an image
    training/     the training loop, precision, cost of a step
    weights/      checkpoints, moving averages, published weights, first stages
    diffusion/    the process, samplers, guidance, randomness
    network/      the denoising network
    recipes.py    tested settings
    config.py     settings
    bounds.py     check the bounds of settings

Start with training/train.py.
"""
