"""Tests of zeroopt/integrations/accelerate."""
