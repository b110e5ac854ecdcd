"""Tests of csrc/cuda."""
