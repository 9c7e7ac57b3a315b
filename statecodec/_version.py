"""The package version (the file format has its own, see docs/format.md)."""

__version__ = "0.1.0"
