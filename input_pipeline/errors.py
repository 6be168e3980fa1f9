"""Errors with data, each described in one line that names the flag to change."""

# Beyond this share of images that cannot be decoded, something is wrong with all of them.
MAX_UNREADABLE = 0.01


class DataError(Exception):
    """A data set is not available as requested. The message says what would work."""
