"""A model that learns a language by filling in missing words, and then a domain from few labels.

    python -m recipes.understand

In reading order:

    model     an encoder, a head that fills in words, and one that tells domains apart
    masking   which words are missing
    presets   from less than a million parameters to BERT's larger size
    domains   texts, and which part of SciPy they are about
    __main__  the training
"""
