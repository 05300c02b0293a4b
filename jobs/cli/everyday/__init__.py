"""Verbs to look around in a root, to tidy it up, and to begin: show, ls, rm, init, doctor.

Input: a root, or nothing. Output: tables, JSON, files of settings.
Start with root.py.
"""
