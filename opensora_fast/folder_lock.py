"""One run at a time writes into a folder: two would take each other's checkpoints or features apart."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora_fast.files import naming_file

LOCK = ".lock"


@contextmanager
def hold_folder(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs out of the folder during the block; a process that dies lets go of it.

    Where the file system knows no locks, `report` is told, and nothing is kept out.

    Raises:
        ValueError: another run is there.
        OSError: the file `.lock` could not be written; its name is in it.
    """
    # Without a buffer: what a full disk does not take must not be tried again when the file is closed.
    with (folder / LOCK).open("ab+", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode().strip()
            raise ValueError(
                f"another run is writing into {folder} ({holder}): wait for it or stop it, or give another folder"
            ) from None
        except OSError as error:
            report(f"note: {folder} cannot be locked ({error}): see to it that no other run writes there")
        with naming_file(folder / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
