"""Scripts that nobody runs: mypy and pyright, both strict, find nothing to say of them (`make lint`, `make types`)."""
