"""Measurements: every number that the documentation states comes from a module of this package."""
