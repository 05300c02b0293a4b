"""The images of the demo: emoji from packages, or synthetic shapes.

Input: names of styles. Output: a folder of images with captions.
The packages are fetched by npm when the demo runs.
Start with demo_corpus.py.
"""
