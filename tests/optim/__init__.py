"""Tests of zeroopt/optim."""
