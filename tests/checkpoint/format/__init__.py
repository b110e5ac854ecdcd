"""Tests of zeroopt/checkpoint/format."""
