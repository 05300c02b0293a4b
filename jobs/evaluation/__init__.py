"""Does the style of the images follow the database?

Input: a run and style databases. Output: accuracies of a style classifier, with intervals.
Subjects of the prompts were held out from training.
Start with evaluate_stage.py.
"""
