"""One shape for every stage: plan, process, commit, seal.

Input: a `Stage` with settings and sealed input folders. Output: a sealed folder with manifest.json.
A stage that was interrupted continues when it is run again. Knows nothing of Ray.
Start with stage.py, then driver.py.
"""
