"""The denoiser: from a batch of pictures and their neighbours to new pictures (torch only, no Ray)."""
