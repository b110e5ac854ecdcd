"""Pictures and captions: a model that finds the caption of a picture, and writes one.

    python -m recipes.see_and_read

In reading order:

    scenes     what there is to see, the words for it, and pictures of it
    gathering  features of all ranks, through which gradients go back
    model      CoCa: a tower for pictures, one for captions, and one that looks at the former and writes
    presets    sizes, and how each is trained
    writing    captions from a trained model
    __main__   the training
"""
