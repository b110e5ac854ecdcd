"""What is held where, for people.

In reading order; each imports from those above it:

    env        the build, the versions and the machine, for bug reports
    footprint  the bytes of a wrapped model
"""
