"""Wheels for every supported Python, with the CPU kernels, and a second flavour with the CUDA kernels as well: `make wheels`.

In reading order; each imports from those above it:

    interpreters  the Pythons at hand, and virtual environments of them
    sysroot       the libc and the compiler of an older Linux
    contents      what a wheel may hold
    building      sources, kernels once for all Pythons, wheels
    smoke         script: an installed wheel trains as plain torch does
    trying        each wheel in an environment of its own
    __main__      the command line
"""
