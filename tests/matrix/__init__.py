"""Releases of torch and of Python, one quick suite each: `python -m tests.matrix` (`make matrix`).

cells  which releases, and which of them go together
uv     environments
trees  a copy of the sources for each Python, with its kernels
suite  an environment of one cell, and what is run in it
table  what has come of all of them
"""
