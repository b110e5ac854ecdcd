"""Tests of zeroopt/parameters."""
