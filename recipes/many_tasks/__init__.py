"""One trunk that learns several tasks at once: ranks work on different ones in the same step, and take turns.

    python -m recipes.many_tasks

In reading order:

    tasks     what is asked of a picture, and how good an answer is
    model     a trunk, and a head for each task
    presets   trunks, and how each is trained
    __main__  the training
"""
