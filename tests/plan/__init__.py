"""Tests of zeroopt/plan."""
