"""The exception of this package: the file or field, what was found, what was expected, and the remedy."""


class DataError(Exception):
    """An error in data or their settings that the user can fix. The command line prints it and exits with status 2."""
