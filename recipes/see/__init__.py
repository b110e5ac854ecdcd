"""A network that sees what is in an image: a residual network, or a vision transformer.

    python -m recipes.see

In reading order:

    resnet    residual networks, of 18 to 152 layers
    norms     what normalises their channels, on one rank or over all of them
    presets   networks, and how each is trained
    images    what is trained on: digits, or a folder of images
    __main__  the training
"""
