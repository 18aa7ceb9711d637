"""The exception of the data room: what is wrong with which file or field, and the remedy, in one sentence."""


class DataError(Exception):
    """Data or a data setting that the user can mend. The command line prints it and exits with status 2."""
