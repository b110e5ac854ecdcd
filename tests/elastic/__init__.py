"""Tests of zeroopt/elastic."""
