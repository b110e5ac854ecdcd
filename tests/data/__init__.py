"""Tests of zeroopt/data."""
