"""Tests of zeroopt/checkpoint/foreign."""
