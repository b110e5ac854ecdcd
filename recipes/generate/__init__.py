"""A GPT that writes documentation, and answers what a function does.

    python -m recipes.generate

In reading order:

    model     GPT: from tokens to the loss of the next ones
    presets   from 1 million to 17 billion parameters
    answers   questions and answers, to be fine-tuned on
    writing   text from a trained model
    __main__  the training
"""
