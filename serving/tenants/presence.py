"""Which servers of a home live.

Each holds a lock on a file of its own. The system frees it when the process ends, however it ends:
nobody has to send signs of life, and no clock decides who is dead.
"""

from pathlib import Path

from filelock import FileLock, Timeout


class Presence:
    """One server's sign, from `begin` to `end`."""

    def __init__(self, home: Path, server: str) -> None:
        self._folder = home / "servers"
        # Begun and ended by different threads.
        self.lock = FileLock(self._path(server), thread_local=False)

    def _path(self, server: str) -> Path:
        return self._folder / f"{server}.lock"

    def begin(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self.lock.acquire()

    def end(self) -> None:
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)

    def is_dead(self, server: str) -> bool:
        """Tell whether another server has ended. Its file is removed then."""
        lock = FileLock(self._path(server))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        lock.release()
        self._path(server).unlink(missing_ok=True)
        return True
