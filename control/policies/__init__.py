"""The policies that ship: one small pure file each, found by the entry points in pyproject.toml."""
