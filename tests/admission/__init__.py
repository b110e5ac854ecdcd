"""Tests of zeroopt/admission."""
