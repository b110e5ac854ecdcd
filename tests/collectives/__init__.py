"""Tests of zeroopt/collectives."""
