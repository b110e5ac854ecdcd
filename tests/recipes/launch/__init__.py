"""Tests of recipes/launch."""
