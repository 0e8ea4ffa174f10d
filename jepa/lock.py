"""One run to a folder: a lock that dies with its process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jepa.config import ConfigError

_log = logging.getLogger(__name__)


@contextmanager
def exclusive(folder: Path, *, name: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Makes `folder` this process's own while the body runs.

    Args:
        folder: made where it is absent.
        name: of the file in it that is locked. The file stays, since removing it would race.
        wait: for the process that has it, instead of refusing.

    Raises:
        ConfigError: another process has it.

    A record lock: it belongs to the process, so workers do not inherit it, and it ends however the
    process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ConfigError(
                    f"config: output must be a folder that no other run uses, got {folder}, where "
                    f"process {file.read().decode() or 'unknown'} is at work."
                ) from None
            # A file system without locks: two runs are the user's own care there.
            _log.warning("%s cannot be locked (%s)", folder, error.strerror)
        # Only for the sentence: a full disk does not undo the lock.
        with suppress(OSError):
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield
