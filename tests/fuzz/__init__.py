"""Readers of files and flags, fed with damaged and hostile input: only the package's own one-line errors come out.

`test_fuzz.py` tries a fixed number of inputs; `python -m tests.fuzz` goes on for as long as it is told.
"""
