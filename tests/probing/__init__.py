"""Tests of zeroopt/probing."""
