"""PackCache: a folder of the user's that keeps packed weights from one process to the next.

Only what this user alone can have written is used: the folder and its files must belong to the
user, nobody else may write to them, and no link is followed. A file is written under another name
and renamed when it is whole, so processes that write the same at once do not meet, and a file that
is read or mapped never changes: it is replaced, or removed. Files of other names are left alone.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastgen.checks import wrong_value

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("fastgen.cache")

IS_SUPPORTED = sys.platform != "win32"  # it rests on POSIX's owners, descriptors and locks

FOLDER_VARIABLE, SIZE_VARIABLE = "FASTGEN_CACHE", "FASTGEN_CACHE_SIZE"
OFF = ("off", "0", "false", "no")
DEFAULT_MB = 8192
_MB = 2**20
_ENTRY = re.compile(r"([0-9a-f]{64})\.packed")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
_NOT_OURS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedError(OSError):
    """What lies there may be another user's."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One file: its key, its bytes, and when it was used last, in seconds since 1970."""

    key: str
    num_bytes: int
    used: float


def default_folder() -> Path | None:
    """$FASTGEN_CACHE, else fastgen/ in $XDG_CACHE_HOME, else in ~/.cache; None where FASTGEN_CACHE
    is "off" (or 0, false, no), or there is no such place.
    """
    own = os.environ.get(FOLDER_VARIABLE, "")
    if own:
        return None if own.lower() in OFF else Path(os.path.abspath(os.path.expanduser(own)))
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):
        return Path(shared, "fastgen")
    home = os.path.expanduser("~")
    return Path(home, ".cache", "fastgen") if os.path.isabs(home) else None


def chosen_folder(cache: bool | str | Path) -> Path | None:
    """The folder that `load(cache=...)` names; None: there is none.

    Raises:
        OptionError: it begins with "~", and there is no such home.
    """
    if isinstance(cache, bool):
        folder = default_folder() if cache else None
    else:
        try:
            folder = Path(cache).expanduser().absolute()
        except RuntimeError as error:
            raise wrong_value("cache", f"{cache}: there is no such home") from error
    return folder if IS_SUPPORTED else None


def default_max_bytes() -> int:
    """$FASTGEN_CACHE_SIZE, in MB, else DEFAULT_MB."""
    told = os.environ.get(SIZE_VARIABLE, "")
    if re.fullmatch(r"[0-9]{1,9}", told):
        return int(told) * _MB
    if told:
        logger.warning("%s=%s is no number of MB: %d are used", SIZE_VARIABLE, told, DEFAULT_MB)
    return DEFAULT_MB * _MB


class PackCache:
    """The cache in one folder, of at most `max_bytes`; it need not be there yet.

    Every method raises OSError where the system refuses, UntrustedError where the folder or a file
    may be another user's.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path = path
        self.max_bytes = default_max_bytes() if max_bytes is None else max_bytes

    def where(self, key: str) -> str:
        return str(self.path / _entry_name(key))

    @contextmanager
    def opened(self, key: str) -> Iterator[int]:
        """A descriptor of the entry, to be read, closed afterwards.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._folder() as folder, _opened(folder, _entry_name(key)) as file:
            if not _is_own(os.fstat(file)):
                raise UntrustedError(f"{self.where(key)} is not a file of this user alone")
            yield file

    def touch(self, file: int) -> None:
        """This entry has been used."""
        with suppress(OSError):  # of a file system that is only to be read
            os.utime(file)

    def store(self, key: str, num_bytes: int, write: Callable[[int], None]) -> None:
        """Have `write` write an entry of about so many bytes to a descriptor. Others go for it, the
        least recently used first.
        """
        with self._folder(create=True) as folder:
            self._make_room(folder, _entry_name(key), num_bytes)
            name = f".{key}.{os.urandom(8).hex()}.tmp"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, 0o600, dir_fd=folder)
            try:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                write(file)
                os.rename(name, _entry_name(key), src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
                raise
            finally:
                os.close(file)

    def entries(self) -> list[CacheEntry]:
        """Those used last come first; none where there is no folder."""
        try:
            with self._folder() as folder:
                return sorted(_entries(folder), key=lambda entry: -entry.used)
        except FileNotFoundError:
            return []

    def clear(self) -> list[CacheEntry]:
        """Remove all entries; returns them."""
        try:
            with self._folder() as folder:
                _remove_abandoned(folder)
                found = list(_entries(folder))
                for entry in found:
                    _remove(folder, _entry_name(entry.key))
                return found
        except FileNotFoundError:
            return []

    @contextmanager
    def _folder(self, *, create: bool = False) -> Iterator[int]:
        """A descriptor of the folder, so that all that follows is in this one."""
        if create:
            os.makedirs(self.path.parent, exist_ok=True)
            with suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with _descriptor(lambda: os.open(self.path, flags), self.path) as folder:
            status = os.fstat(folder)
            if status.st_uid != os.geteuid() or status.st_mode & _NOT_OURS:
                raise UntrustedError(f"{self.path} is not a folder of this user alone")
            yield folder

    def _make_room(self, folder: int, name: str, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            told = f"{num_bytes / _MB:,.0f} MB, and the cache may have {self.max_bytes / _MB:,.0f}"
            raise OSError(errno.EFBIG, f"the packed weights are {told} ({SIZE_VARIABLE})")
        _remove_abandoned(folder)
        others = [entry for entry in _entries(folder) if _entry_name(entry.key) != name]
        excess = sum(entry.num_bytes for entry in others) + num_bytes - self.max_bytes
        going, freed = list[CacheEntry](), 0
        for entry in sorted(others, key=lambda entry: entry.used):
            if freed >= excess:
                break
            going.append(entry)
            freed += entry.num_bytes
        disk = os.fstatvfs(folder)
        if disk.f_bavail * disk.f_frsize + freed < 2 * num_bytes:  # it is not filled to its end
            raise OSError(errno.ENOSPC, f"{self.path}: too little is free on the disk")
        for entry in going:
            _remove(folder, _entry_name(entry.key))


def _entry_name(key: str) -> str:
    return f"{key}.packed"


@contextmanager
def _descriptor(open_it: Callable[[], int], path: Path | str) -> Iterator[int]:
    try:
        descriptor = open_it()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):  # as systems say O_NOFOLLOW
            raise UntrustedError(f"{path} is a link, or no folder") from error
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _opened(folder: int, name: str) -> AbstractContextManager[int]:
    # O_NONBLOCK: not to wait for what writes to a pipe.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return _descriptor(lambda: os.open(name, flags, dir_fd=folder), name)


def _is_own(status: os.stat_result) -> bool:
    """A regular file that no other user can have written."""
    is_own = status.st_uid == os.geteuid() and not status.st_mode & _NOT_OURS
    return is_own and stat.S_ISREG(status.st_mode)


def _entries(folder: int) -> Iterator[CacheEntry]:
    with os.scandir(folder) as found:
        for item in found:
            if named := _ENTRY.fullmatch(item.name):
                with suppress(FileNotFoundError):  # another process has removed it
                    status = item.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield CacheEntry(named[1], status.st_size, status.st_mtime)


def _remove_abandoned(folder: int) -> None:
    """Files whose writer has ended before they were whole: nobody holds their lock."""
    with os.scandir(folder) as found:
        names = [item.name for item in found if _TEMPORARY.fullmatch(item.name)]
    for name in names:
        with suppress(OSError), _opened(folder, name) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder, name)


def _remove(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
