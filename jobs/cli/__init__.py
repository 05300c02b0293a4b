"""The command line: parse, run, exit code.

Input: arguments. Output: JSON or tables on stdout, logs on stderr, an exit code.
A verb is an options class and a function beside it.
Start with main.py.
"""

import os

if os.environ.get("NO_COLOR"):  # tyro prints the help, and knows only its own variable, at its import
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
