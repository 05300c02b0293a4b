"""Images from a trained run and a database.

Input: prompts, images or database rows, and `SampleConfig`. Output: image files and a grid.
Databases can be mixed by weights.
Start with sample_stage.py.
"""
