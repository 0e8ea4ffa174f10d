"""Which exceptions are the user's to mend, and what the command line says of them instead of a
traceback."""

from __future__ import annotations

INTERRUPTED = 130  # what a shell reports of a process that SIGINT ended
REFUSED = 2


def sentence_of(error: BaseException) -> tuple[str, int] | None:
    """The sentence to print and the exit status, or None for a fault of the program itself."""
    # Imported when something failed: they load torch.
    from jepa.checkpoint import CheckpointError
    from jepa.config import ConfigError
    from jepa.data.clip import BadClipError
    from jepa.data.loader import TooManyBadFilesError
    from jepa.pretrain import NotFiniteError

    if isinstance(error, KeyboardInterrupt):
        return "interrupted: the same command goes on from what was saved last.", INTERRUPTED
    if isinstance(error, OSError):
        # A full disk, a folder that may not be written, a file in the place of a folder.
        named = "" if error.filename is None else f"{error.filename}: "
        return (f"{named}{error.strerror}" if error.strerror else str(error)), REFUSED
    told = (ConfigError, CheckpointError, BadClipError, TooManyBadFilesError, NotFiniteError)
    return (str(error), REFUSED) if isinstance(error, told) else None
