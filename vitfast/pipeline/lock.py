"""A lock on a folder, so that two runs do not write it at once."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path

from vitfast.images.files import InputError, path_text

NAME = ".lock"


class FolderLock:
    """The file `.lock` in a folder, locked by this process and saying so.

    The system gives the lock up when the process ends, however it ends; a file that is left behind then holds nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, without waiting.

        Raises:
            InputError: if another process has it, by its owner's name; or if the folder cannot be written.
        """
        try:
            while self._descriptor is None:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                if self._lock(descriptor):
                    self._descriptor = descriptor
                else:
                    os.close(descriptor)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)
        except OSError as error:
            self.release()
            reason = error.strerror or str(error)
            raise InputError(f"output folder {path_text(self._folder)!r} cannot be written: {reason}") from error

    def _lock(self, descriptor: int) -> bool:
        """Lock an open lock file; False if it has been taken away meanwhile, by the owner that gave it up."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._owner(descriptor)
            os.close(descriptor)
            raise InputError(
                f"output folder {path_text(self._folder)!r} is being written by {owner}: wait for it, "
                "or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"the file system of {path_text(self._folder)!r} has no locks ({error.strerror}): see to it that no "
                "other run writes this folder",
                stacklevel=2,
            )
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    @staticmethod
    def _owner(descriptor: int) -> str:
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"  # which has not written its name yet

    def release(self) -> None:
        """Give the lock up, and take its file away."""
        if self._descriptor is not None:
            try:
                self._path.unlink(missing_ok=True)  # while it is still held: whoever waits finds another file
            finally:
                os.close(self._descriptor)
                self._descriptor = None
