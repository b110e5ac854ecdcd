"""Directories and files of checkpoints. Nothing here knows what is in them.

In reading order; each imports from those above it:

    paths       where checkpoints can be
    files       written with checksums, and on the disk when they are closed
    pickle_bounds      pickles that take no more memory than there is in them
    torch_file_bounds  the same of files of torch.save
    torch_file  a file as torch.save writes it, tensor after tensor
    manifest    the file that says of which files a checkpoint consists
    exchange    two directories change places at once
    directory   directories that are there entirely or not at all
    siblings    the checkpoints of one directory
"""
