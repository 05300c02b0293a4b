"""Images and tars: decode, resize, hash, compare, read and write.

Input: bytes of any image, members of any tar. Output: upright 8-bit RGB, or a reason code.
Knows nothing of datasets and stages.
Start with decode.py.
"""
