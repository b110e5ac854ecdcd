"""What training holds, phase by phase: `python -m bench.memory`.

In the order in which a figure comes about:

    gpt.py            a GPT whose layers are not defined in the order in which they run
    architectures.py  those of transformers
    models.py         all models by name, each with what it is fed
    methods.py        all methods by name: how each prepares a model and an optimizer, and what it should hold
    loops.py          ways to train: with micro-batches, without communication for some, with `zero_grad` or without it
    rank.py           a case, and what a rank does with it while it is watched
    measure.py        a case's ranks, the watching, and what was held when
    __main__.py       the command
"""
