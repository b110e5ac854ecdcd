"""What tests share. These files are imported by their own names: pyproject.toml puts this folder on the path."""
