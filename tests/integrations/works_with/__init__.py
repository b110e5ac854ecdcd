"""Packages that people train with beside zeroopt: docs/frameworks/works_with.md says of each what becomes of it."""
