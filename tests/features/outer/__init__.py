"""Tests of zeroopt/features."""
