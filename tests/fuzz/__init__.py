"""What a coverage-guided fuzzer attacks: readers of files, checks of arguments, and the planner.

`python -m tests.fuzz` (`make fuzz-coverage`) has atheris, which drives libFuzzer, change inputs so that they find new ways through
the Python code. docs/damage.md says what must hold of any input.

    draws     numbers and choices out of an input's bytes
    files     the readers: an input is a file, or one of a checkpoint
    calls     the kernels' functions, called with tensors of any kind that share memory
    plans     the planner, by its property tests
    targets   all of them, each with inputs to begin with
    one       one target under atheris, in a process of its own
"""
