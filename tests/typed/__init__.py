"""Scripts of users: mypy and pyright, both strict, find nothing to say of them (`make lint`, `make types`), and nobody runs them.

user_script       most public functions and classes, each in its place
framework_script  those of the integrations
completeness      names whose types pyright does not know
"""
