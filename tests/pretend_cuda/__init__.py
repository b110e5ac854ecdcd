"""A pretend CUDA device for torch builds without CUDA: see README.md in this folder."""
