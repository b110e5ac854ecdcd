"""Checkpoints: directories that torch.distributed.checkpoint (DCP) reads, there entirely or not at all."""
