"""Tests of zeroopt/checkpoint/disk."""
