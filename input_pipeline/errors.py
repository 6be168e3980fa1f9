"""Errors with data, each described in one line that names the flag to change."""


class DataError(Exception):
    """A data set is not available as requested. The message says what would work."""
