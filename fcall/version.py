"""The version of fcall."""

__version__ = "0.1.0"
