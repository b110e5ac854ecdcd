"""Tests of zeroopt/gradients."""
