"""The first minutes on a GPU, in one command: `python -m bench.gpu`.

In reading order:

    part.py           what a part is, and what it finds
    command.py        a command that is stopped when its time is up
    build.py          the kernels, for the GPU at hand
    record.py         what became of each test, for as long as pytest ran
    tests.py          the tests that need a GPU
    counting.py       launches, copies and waits of the host, as the profiler sees them
    methods.py        GPTs by name, and ways to train them
    training_step.py  a GPT's step beside DDP's: time, launches, waits, memory
    step_table.py     what came of it, as tables
    kernels.py        bytes a second of each kernel beside what does the same
    sanitizer.py      the kernels under compute-sanitizer
    several.py        what needs two GPUs or more
    parts.py          all parts, in the order of what they are worth
    report.py         all that is known so far, as JSON and Markdown
    __main__.py       the command

The command imports nothing of zeroopt, which has yet to be built: parts work in processes of their own.
"""
