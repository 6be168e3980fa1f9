"""What can go wrong in a run, each said to the user in one line."""


class ConfigError(Exception):
    """A flag cannot be followed; the message names it, what was given and what would work."""


class NonFiniteError(Exception):
    """The loss or the gradient of a training step was infinite or not a number."""


class ReadError(Exception):
    """Training data could not be read, or too much of it not decoded, in the middle of a run."""


class SaveError(Exception):
    """What a run is to leave could not be written."""
