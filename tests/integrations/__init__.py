"""Tests of zeroopt/integrations."""
