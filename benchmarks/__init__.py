"""Measurements, each one command: how long something takes beside something else, on the same machine at the same time.

A figure from here is a ratio. Milliseconds of a shared machine are worth little by themselves, so candidates are timed in turn
(`ratio.py`), every sample knows how busy the rest of the machine was (`load.py`), and candidates that cannot share a process,
another revision or another framework, live in one of their own (`worker.py`).
"""
