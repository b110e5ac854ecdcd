"""Tests of zeroopt/checkpoint."""
