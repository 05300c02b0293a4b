"""CLIP encoders, and the stages that embed images and captions.

Input: shards of a dataset. Output: one .npy file of float16 vectors for each shard.
Also reads and writes the embeddings of clip-retrieval and CompVis.
Start with embed.py.
"""
