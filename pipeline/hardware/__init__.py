"""GPUs, CPUs and memory of this machine.

Input: reservations of a worker. Output: a torch device, or an error that names the cause.
Imports nothing of this project.
Start with devices.py.
"""
