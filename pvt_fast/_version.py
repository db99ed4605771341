"""The version, readable without importing torch (the build reads it)."""

__version__ = "0.1.0"
