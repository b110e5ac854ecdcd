"""Tests of zeroopt/ops."""
