"""Directories and files of checkpoints. Nothing here knows what is in them.

In reading order; each imports from those above it:

    paths       where checkpoints can be
    files       written with checksums, and on the disk when they are closed
    torch_file  a file as torch.save writes it, tensor after tensor
    manifest    the file that says of which files a checkpoint consists
    exchange    two directories change places at once
    directory   directories that are there entirely or not at all
    siblings    the checkpoints of one directory
"""
