"""The version, for anyone to import: it stands below everything."""

__version__ = "0.1.0"
