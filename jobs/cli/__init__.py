"""The command line: parse, run, exit code.

Input: arguments. Output: JSON or tables on stdout, logs on stderr, an exit code.
A verb is an options class and a function beside it.
Start with main.py.
"""
