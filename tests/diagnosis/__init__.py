"""Tests of zeroopt/diagnosis."""
