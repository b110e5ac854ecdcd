"""Tests of zeroopt/state."""
