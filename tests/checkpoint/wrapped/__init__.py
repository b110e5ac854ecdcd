"""Tests of zeroopt/checkpoint/wrapped."""
