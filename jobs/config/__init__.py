"""The tree of all settings, from recipes, TOML files and flags.

Input: the name of a recipe, and what overrides it. Output: one frozen dataclass for each section.
Each section is defined beside the code that uses it.
Start with settings.py.
"""
