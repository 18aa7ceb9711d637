"""The exceptions of this package: the file or field, what was found, what was expected, and the remedy."""


class DataError(Exception):
    """An error in data or their settings that the user can fix. The command line prints it and exits with status 2."""


class StorageUnavailableError(Exception):
    """Storage that did not answer for longer than requests are retried; starting again later may help.

    Neither an ``OSError`` nor a ``DataError``, so that nothing mistakes it for a missing or damaged file. The command
    line prints it and exits with status 69 (EX_UNAVAILABLE), after which launchers start the run again.
    """


class DataWorkerError(Exception):
    """A process that builds examples was killed or crashed; starting again may help, as after a lost machine."""
