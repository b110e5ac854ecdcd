"""Tests lie where what they test lies: zeroopt/plan/regions.py has tests/plan/test_regions.py. CONTRIBUTING.md says more."""
