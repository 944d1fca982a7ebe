"""Files that appear whole or not at all, places that are checked before the work, and JSON that stays valid."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

from svg.documents import read_text, shown

from .locks import try_lock, unlock

_NUMBERS = re.compile(r'\[\n(?:\s+(?:-?[\d.e+-]+|null|"-?inf"),?\n)+\s+\]')
_LEFT = re.compile(r"\.svg-[0-9a-f]{16}\.(part|lock)")
_FINISHED = ".svg-finished"  # a finished run's files, on their way into a folder that was there before
_BEGUN = ".svg-unfinished"  # in a growing folder until its run is finished: what is being done, so that it can go on
_GONE = ".gone"  # in it: a result that the run doesn't have, so that an earlier one of that name goes


@contextmanager
def atomic_path(path):
    """Give a temporary file in the same folder and move it to `path` when the block ends without an error.

    Its name is random and the file is made anew, so no link and no file that is there already is ever written through. A
    lock beside it is held while the block runs: `remove_partials` sees by that whether its writer still lives.

    Args:
        path: where the finished file is to appear; an existing file is replaced in one step.

    Yields:
        Path to write to; it is removed if the block raises, KeyboardInterrupt included.

    Raises:
        OSError: the folder is not there or cannot be written to, or what is at `path` is no file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} must be a plain file, got something else at that place: choose another name")
    partial = path.parent / f".svg-{secrets.token_hex(8)}.part"
    lock = try_lock(partial.with_suffix(".lock"))
    try:
        _make(partial)
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        unlock(lock)


def remove_partials(folder, ours=True):
    """Remove the temporary files that killed processes left in a folder; those of living ones, and all else, stay.

    Args:
        folder: where to look; folders in it are not looked into.
        ours: whether the folder is one of ours; elsewhere only files with their lock beside them are taken for ours.
    """
    for path in sorted(Path(folder).iterdir()):
        if not _LEFT.fullmatch(path.name) or not _is_plain(path) or (path.suffix == ".part" and not ours):
            continue
        if path.with_suffix(".part").is_dir():
            continue  # of a folder of results, whose next run sees to it
        with suppress(OSError):
            lock = try_lock(path.with_suffix(".lock"))
            if lock is None:
                continue
            if _is_plain(path.with_suffix(".part")):
                path.with_suffix(".part").unlink()
            unlock(lock)


def check_outputs(outputs, inputs=()):
    """Refuse places for results before any work is done.

    Args:
        outputs: {argument: path of a file to write}; None where it was not given.
        inputs: files and folders that the same command reads; None counts as nothing. A path is what it leads to, by links,
            other folders or another spelling.

    Raises:
        ValueError: a place is an input or another output, no plain file, in a folder that is not there, or cannot be
            written to.
    """
    given = {name: Path(path) for name, path in outputs.items() if path is not None}
    for name, path in given.items():
        _check_name(name, path)
        if path.exists() and not path.is_file():
            kind = "the folder" if path.is_dir() else "no plain file,"
            raise ValueError(f"{name} must be a file, got {kind} {path}: choose another name")
        check_not_input(name, path, inputs)
        for other, rival in given.items():
            if name < other and os.path.realpath(path).casefold() == os.path.realpath(rival).casefold():
                raise ValueError(f"{name} and {other} must be two files, got {path} and {rival}: choose another name")
        _check_writable(name, path, path.parent)
        remove_partials(path.parent, ours=False)


def check_folder(name, folder, files, inputs=()):
    """Refuse a folder of results before any work is done.

    Args:
        name: the argument that asks for it.
        folder: it may be there, or be made later.
        files: names of what will be written right into it.
        inputs: as `check_outputs` takes them.

    Raises:
        ValueError: it is a file, cannot be written to, or one of the files would replace an input.
    """
    folder = Path(os.path.abspath(folder))
    _check_name(name, folder)
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {folder}: choose another name")
    for file in files:
        check_not_input(name, folder / file, inputs)
    _check_writable(name, folder, next(place for place in (folder, *folder.parents) if place.exists()))


def check_no_others(name, folder, files):
    """Refuse a folder that holds results of another command, whose page this one would replace.

    Args:
        name: the argument that asks for it.
        folder: it may be there, or be made later.
        files: names of those results.

    Raises:
        ValueError: one is there.
    """
    found = [file for file in files if os.path.lexists(Path(folder) / file)]
    if found:
        raise ValueError(
            f"{name} must hold no results of another command, got {folder} with {found[0]}: choose another folder"
        )


def check_not_input(name, path, inputs):
    """Refuse to write where a command reads.

    Args:
        name: the argument that asks for it.
        path: where a file is to be written.
        inputs: files and folders that are read; None counts as nothing. Of a folder the files that are in it count.

    Raises:
        ValueError: they are one.
    """
    path = Path(path)
    for source in inputs:
        if source is None:
            continue
        inside = [folder for folder in Path(os.path.realpath(path)).parents if _is_same(folder, source)]
        if _is_same(path, source) or (inside and path.exists()):
            raise ValueError(f"{name} must not be one of the inputs, got {path} for {source}: choose another name")


def to_json(value):
    """Return `value` with infinities spelled "inf" and "-inf", which JSON has no number for.

    Args:
        value: nested dicts, lists, tuples, strings, numbers, bools and None.

    Returns:
        The same nesting made of what the json module takes.

    Raises:
        ValueError: a number is NaN, which no measurement may be.
    """
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("a report must not hold NaN: some measurement failed")
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def write_json(path, value):
    """Write `value` as indented JSON, atomically, lists of numbers on one line; infinities become "inf" and "-inf"."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False)
    text = _NUMBERS.sub(lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n")


@contextmanager
def result_folder(out, names, force=False, inputs=()):
    """Give a hidden temporary folder whose files appear in `out` together, when the block ends without an error.

    The temporary folder is made in the nearest existing folder above `out`, so a place that cannot be written to is
    found out before any work is done, and an error or an interrupt leaves nothing behind. It is locked: a second run into
    `out` is refused, and what a killed run left is removed by the next one. A new `out` appears by one rename. Where `out`
    was there, one rename makes the run count as finished, and a kill among the moves after it is made good by the next run.

    Args:
        out: the folder to fill; it may exist, other files in it are left alone.
        names: every file name a run may write, in the order of appearance; the last one marks a complete run.
        force: replace the results of an earlier run.
        inputs: files and folders that the run reads; none of them is overwritten.

    Yields:
        Path of the temporary folder.

    Raises:
        ValueError: `out` is not a folder, holds results and force is off, holds an input of a result's name, is being
            written to by another run, or cannot be written to.
    """
    with _claimed(Path(os.path.abspath(out)), names, force, inputs) as (partial, out):
        yield partial
        _publish(partial, out, names)


@contextmanager
def growing_folder(out, names, force=False, inputs=(), work=""):
    """Give a GrowingFolder for `out`, whose `publish` makes finished files appear; what was not published is dropped.

    Checks, lock and temporary folder are those of `result_folder`. An error before the first `publish` changes nothing.

    Args:
        out, names, force, inputs: as `result_folder`; the last name is that of the file that says what is there.
        work: what is done, as text. A run of the same work that was killed or stopped before `finish` may be there: its files
            stay until this run has the same ones.

    Yields:
        The GrowingFolder.

    Raises:
        ValueError: as `result_folder`.
    """
    begun = hashlib.sha256(work.encode(errors="surrogateescape")).hexdigest()
    out = Path(os.path.abspath(out))
    goes_on = bool(work) and _begun(out) == begun
    with _claimed(out, names, force or goes_on, inputs) as (partial, out):
        yield GrowingFolder(partial, out, names, begun)


class GrowingFolder:
    """A folder of results that is filled piece by piece; every file in it is whole.

    Attributes:
        path: a hidden temporary folder to write to.
    """

    def __init__(self, path, out, names, begun):
        self.path = path
        self._out, self._names, self._begun = out, names, begun

    def publish(self):
        """Move what was written since the last time to its place, in the order of the names.

        Before the first file, results of another run go, the last name first: it must not vouch for other files.
        """
        self._out.mkdir(parents=True, exist_ok=True)
        if _begun(self._out) != self._begun:
            for name in reversed(self._names):
                (self._out / name).unlink(missing_ok=True)
            with atomic_path(self._out / _BEGUN) as partial:
                partial.write_text(self._begun)
        for name in self._names:
            if (self.path / name).exists():
                (self.path / name).replace(self._out / name)

    def finish(self):
        """Say that everything is there: from now on the results are an earlier run's."""
        (self._out / _BEGUN).unlink(missing_ok=True)


def _begun(out):
    """What a run that is not finished yet has begun in a folder, or None."""
    try:
        return read_text(out / _BEGUN, 100)
    except (OSError, ValueError):
        return None


@contextmanager
def _claimed(out, names, force, inputs):
    """The checked and locked temporary folder of `out`, and `out`; it is gone after the block unless it became `out`."""
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}: choose another name")
    anchor = next(folder for folder in (out, *out.parents) if folder.exists())
    partial = _partial_of(anchor, out)
    lock = _own_folder(partial, out, names)
    try:
        if out.exists():
            _move_in(out / _FINISHED, out, names)
            remove_partials(out, ours=False)
        for folder in (folder for folder in out.parents if folder != anchor):
            _clear_earlier(folder, out, names)
        _check_free(out, names, force)
        for name in names:
            check_not_input("out", out / name, inputs)
        yield partial, out
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        unlock(lock)


def _clear_earlier(anchor, out, names):
    """Remove the temporary folder of a killed run from before `out` was there; that of a living one is respected."""
    partial = _partial_of(anchor, out)
    if partial.is_dir() and not partial.is_symlink():
        unlock(_own_folder(partial, out, names), remove=True)
        shutil.rmtree(partial, ignore_errors=True)


def _partial_of(anchor, out):
    """Where the temporary folder of `out` is, in a folder above it or in itself."""
    place = hashlib.sha256(os.path.relpath(out, anchor).encode(errors="surrogateescape")).hexdigest()[:16]
    return anchor / f".svg-{place}.part"


def _check_free(out, names, force):
    found = [name for name in names if (out / name).exists()]
    if found and not force:
        raise ValueError(
            f"out must hold no earlier results, got {out} with {', '.join(found)}: "
            "choose another folder or pass --force"
        )


def _own_folder(partial, out, names):
    """Make a temporary folder and lock it; what a killed run left there is removed. Returns the lock."""
    try:
        lock = try_lock(partial.with_suffix(".lock"))
    except OSError as error:
        raise _unwritable(out, error.strerror) from error
    if lock is None:
        raise ValueError(f"another run is writing to {out}: wait for it to end, or choose another folder")
    try:
        _empty(partial, out, names)
    except BaseException:
        unlock(lock)
        raise
    return lock


def _empty(partial, out, names):
    """Make a folder, or clear it of what a killed run left; anything else in it is left alone and refused."""
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error.strerror) from error
    if partial.is_symlink():
        raise _unwritable(out, f"{partial} is a link")
    left, ours = list(partial.iterdir()), {*names, *(f"{name}{_GONE}" for name in names)}
    if any(path.is_dir() or not (path.name in ours or _LEFT.fullmatch(path.name)) for path in left):
        raise ValueError(f"{partial} is in the way: svg would write its results there, so move it elsewhere")
    for path in left:
        path.unlink()


def _unwritable(out, reason):
    return ValueError(f"out must be writable, got {out} ({reason}): choose another folder")


def _publish(partial, out, names):
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(out)
        return
    for name in names:
        if not (partial / name).exists():
            (partial / f"{name}{_GONE}").touch()
    partial.replace(out / _FINISHED)
    _move_in(out / _FINISHED, out, names)


def _move_in(finished, out, names):
    """Move a finished run's files to their places, where a killed process had begun to as well."""
    if not finished.is_dir() or finished.is_symlink():
        return
    if (finished / names[-1]).exists():
        (out / names[-1]).unlink(missing_ok=True)  # an interrupted replacement must not look complete
    for name in names:
        gone = finished / f"{name}{_GONE}"
        if gone.exists():
            (out / name).unlink(missing_ok=True)
            gone.unlink()
        elif (finished / name).exists():
            (finished / name).replace(out / name)
    finished.rmdir()


def _make(path):
    """Make a new, empty file; one that is there, or a link, is refused."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))


def _is_plain(path):
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _check_name(name, path):
    """Refuse a path that no file can have, and a link that leads nowhere."""
    try:
        there = os.path.lexists(path)
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not there:
            return
        raise ValueError(
            f"{name} must be a place for results, got {shown(str(path))} ({error.strerror}): choose another name"
        ) from error


def _check_writable(name, path, folder):
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "is not there: make it first"
        raise ValueError(f"{name} must be in a folder, got {path}: {folder} {kind}")
    partial = folder / f".svg-{secrets.token_hex(8)}.part"
    try:
        _make(partial)
    except OSError as error:
        raise ValueError(f"{name} must be writable, got {path} ({error.strerror}): choose another folder") from error
    partial.unlink()


def _is_same(path, other):
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(other)
