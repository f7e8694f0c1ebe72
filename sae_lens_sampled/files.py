"""Atomic writes of files and folders, safe beside other processes that do the same; clear errors for full disks."""

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from secrets import token_hex

from filelock import FileLock

SCRATCH = "unfinished_"
"""Prefix of the names of scratch folders."""


class NoSpaceError(OSError):
    """A disk is full; the message says where, and how much is free there."""


def atomic_write(path: Path, text: str) -> None:
    """Write beside `path`, then rename: the file at `path` is always complete, even if the process is killed.

    Raises:
        NoSpaceError: if the text does not fit; no partial file is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{token_hex(8)}.unfinished")
    with reporting_no_space(path.parent):
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def check_writable(path: Path, name: str) -> None:
    """Check that an output folder can be created at `path` and written to, before anything is computed for it.

    Raises:
        ValueError: if not, with the argument's `name`, the path, and what is in the way.
    """
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{name}={str(path)!r} cannot be a folder: {str(nearest)!r} is a file. Use another path.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={str(path)!r} cannot be written: {str(nearest)!r} is not writable. Use another path.")


def check_new(path: Path, name: str) -> None:
    """As `check_writable`, for a path that must not exist yet.

    Raises:
        ValueError: also if it exists.
    """
    if path.exists():
        raise ValueError(f"{name}={str(path)!r} already exists; nothing is overwritten. Use another path.")
    check_writable(path, name)


@contextmanager
def atomic_path(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which is renamed to `path` at the end.

    With `replace`, a folder at `path` is replaced; otherwise a folder there that is not empty is kept, and the new one
    deleted.

    Raises:
        NoSpaceError: if the file or folder does not fit; nothing of it is left then.
    """
    with scratch_folder(path.parent) as scratch, reporting_no_space(path.parent):
        yield scratch / path.name
        if replace:
            shutil.rmtree(path, ignore_errors=True)  # a folder cannot be renamed over one that is not empty
        atomic_rename(scratch / path.name, path)


def atomic_rename(source: Path, path: Path) -> None:
    """Rename a complete file or folder to `path`. A folder that another process has completed there is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent`, deleted at the end. First deletes scratch folders that killed processes left.

    Processes in other containers or on other hosts may do the same at the same time: names are random, and a folder is
    deleted only by its owner, or on the same host once the owner's lock is gone.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(parent)
    scratch = parent / f"{SCRATCH}{token_hex(8)}@{platform.node()}"
    lock_file = scratch.with_name(f"{scratch.name}.lock")
    lock = FileLock(lock_file)
    try:
        with suppress(OSError, NotImplementedError):  # if the file system has no locks, no one else deletes it
            lock.acquire()
        scratch.mkdir()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()
        lock_file.unlink(missing_ok=True)


def _delete_abandoned(parent: Path) -> None:
    for lock_file in parent.glob(f"{SCRATCH}*@{escape(platform.node())}.lock"):
        with suppress(OSError, NotImplementedError), FileLock(lock_file, timeout=0):
            shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
            lock_file.unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link a file to `target`, or copy it where that is impossible."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def reserve(file: Path, n_bytes: int, what: str) -> None:
    """Create a file for a memory map, fully allocated where possible: a write on a full disk would kill the process.

    Raises:
        NoSpaceError: if the bytes do not fit; the message names `what` they are for, and no file is left.
    """
    with reporting_no_space(file.parent, f"{_size(n_bytes)} are needed for {what}"):
        try:
            with file.open("wb") as stream:
                _allocate(stream.fileno(), file.parent, n_bytes)
        except OSError:
            file.unlink(missing_ok=True)
            raise


@contextmanager
def reporting_no_space(folder: Path, need: str = "there is more to write") -> Iterator[None]:
    """Convert an error from a full disk, taken to be that of `folder`, into a `NoSpaceError` beginning with `need`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NoSpaceError) or not _is_of_full_disk(error, folder):
            raise
        free = _size(shutil.disk_usage(folder).free)
        raise NoSpaceError(
            f"{need}, but {_lasting(folder)} has {free} left (less under a quota); make room or choose another "
            "folder. Finished work is kept."
        ) from error


def _allocate(descriptor: int, folder: Path, n_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except (AttributeError, OSError) as error:  # not on macOS and Windows, and not on every file system
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if shutil.disk_usage(folder).free < n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _is_of_full_disk(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "inline_container" in str(error):  # torch.save reports only where in its code it stopped
        return shutil.disk_usage(folder).free < 2**20
    return os.strerror(errno.ENOSPC) in str(error)  # safetensors


def _lasting(folder: Path) -> Path:
    """`folder`, or if it is scratch, the nearest folder above it that is not."""
    return next(path for path in (folder, *folder.parents) if not any(SCRATCH in part for part in path.parts))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
