"""Tests of csrc/cpu."""
