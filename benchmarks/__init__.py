"""Measurements against peers; each program prints a table. See CONTRIBUTING.md."""
