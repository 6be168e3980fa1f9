"""What goes wrong with data, said in one line that names the flag to change."""


class DataError(Exception):
    """A data set cannot be had as asked; the message says what would work."""
