"""Tests of zeroopt/options."""
