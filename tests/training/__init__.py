"""Whole trainings, each beside DistributedDataParallel or another reference."""
