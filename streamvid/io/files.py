"""Output files that are whole or absent, and disk errors told in one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamvid.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def output_error(error: OSError, path: Path, kept: str = "") -> UserError:
    """`error` met while writing `path`, as one sentence; `kept` says what of the output is safe."""
    if error.errno in DISK_FULL:
        reason, fix = "the disk is full", "free some space or choose another place"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason, fix = "writing there is not permitted", "choose a folder that you may write to"
    elif error.errno == errno.EISDIR:
        reason, fix = "it is a folder", "give the name of a file"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        reason, fix = "a file stands where a folder is needed", "choose another place"
    else:
        reason, fix = f"it cannot be written ({error.strerror or error})", "choose another place"
    kept = f"; {kept}" if kept else ""
    return UserError(f"output '{path}': {reason}{kept}; {fix}.")


def prepare_output_file(path: str | Path) -> Path:
    """Make the folder of `path` and prove that the file can be written; what it holds stays untouched."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise output_error(error, path) from error
    return path


def prepare_output_folder(path: str | Path) -> Path:
    """Make the folder `path` and prove that files can be written in it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = temporary_sibling(path / "probe")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise output_error(error, path) from error
    return path


def temporary_sibling(path: Path) -> Path:
    """A hidden name of the same suffix in the same folder, so that renaming it to `path` is atomic."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


@contextmanager
def replace_atomically(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path; once the block has written it, it becomes `path` in one step.

    If the block fails, `path` keeps what it held and the temporary file is removed. `durable` waits
    until the data is on the disk, so that not even a power cut leaves an empty file.
    """
    temporary = temporary_sibling(path)
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
