"""The denoiser: from pictures and their neighbours to new pictures (torch only, no Ray)."""
