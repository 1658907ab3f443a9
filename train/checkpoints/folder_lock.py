"""One run at a time writes into a folder: two would take each other's checkpoints or features apart."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def hold_folder(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs out of the folder during the block; a process that dies lets go of it.

    Where the file system knows no locks, `report` is told, and nothing is kept out.

    Raises:
        ValueError: another run is there.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"another run is writing into {folder} ({file.read().strip()}): wait for it or stop it, or give "
                "another folder"
            ) from None
        except OSError as error:
            report(f"note: {folder} cannot be locked ({error}): see to it that no other run writes there")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
