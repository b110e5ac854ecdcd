"""A trained GPT learns to answer, and which answers are preferred, by a few narrow matrices beside its own, which stay as they are.

    python -m recipes.adapt

In reading order:

    lora         adapters in linear layers
    preferences  pairs of a better and a worse answer, and what is learned from them
    presets      sizes
    trunk        the GPT that is adapted
    __main__     the training
"""
