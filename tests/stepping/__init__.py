"""Tests of zeroopt/stepping."""
