"""What README and docs/ say is true of the code."""
