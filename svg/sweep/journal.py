"""A journal of finished work: one file an entry, whole or not there, so that a kill at any moment loses nothing else."""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from svg.eval.files import atomic_path, remove_partials, to_json
from svg.eval.locks import try_lock, unlock

from ..documents import MEBIBYTE, read_json


class JournalError(ValueError):
    """A journal that must not be written to or read from, and why."""


class Journal:
    """Entries in a folder, each with the files that belong to it.

    An entry counts only if it is whole: its own SHA-256 is in it, and those of its files. Everything else is as if it
    was never written.

    Args:
        folder: the results' folder; entries go to its subfolder `journal`, files lie anywhere in it.
        version: version of the format; a journal of another one is refused.
    """

    FORMAT = "svg-sweep-journal"
    _FOLDERS = ("journal", "videos", "frames")

    def __init__(self, folder, version):
        self.folder, self.version = Path(folder), version
        self.entries = self.folder / "journal"

    @contextmanager
    def locked(self):
        """Hold the journal for one process; make it if it isn't there.

        Raises:
            JournalError: another process holds it, or it has another version.
            OSError: the folder cannot be written to.
        """
        self.check_version()
        self.entries.mkdir(parents=True, exist_ok=True)
        lock = try_lock(self.entries / "lock")
        if lock is None:
            raise JournalError(
                f"another sweep is writing to {self.folder}: wait for it to end, or choose another folder"
            )
        try:
            if (self.entries / "format.json").exists():  # else the folder is not ours to clear up
                for folder in (self.folder, *(path for path in self.folder.iterdir() if path.name in self._FOLDERS)):
                    remove_partials(folder)
            self._write(self.entries / "format.json", {"format": self.FORMAT, "version": self.version})
            yield self
        finally:
            unlock(lock, remove=False)

    def check_version(self):
        """Raise JournalError if the folder's journal, where there is one, has another version."""
        path = self.entries / "format.json"
        if not path.exists():
            return
        try:
            found = read_json(path, MEBIBYTE)
        except (ValueError, OSError):
            found = None
        if found != {"format": self.FORMAT, "version": self.version}:
            got = found.get("version", found) if isinstance(found, dict) else "a damaged format.json"
            raise JournalError(
                f"the journal in {self.folder} must have version {self.version}, got {got}: its results stay as they are; "
                f"choose another folder, or read it with the svg-video that wrote it"
            )

    def write(self, name, record, files):
        """Add an entry, or replace one; when this returns it survives a kill and a power cut.

        Args:
            name: the entry's name.
            record: what `to_json` takes.
            files: paths, relative to the folder, of the finished files that belong to it.
        """
        record = to_json(record)
        content = {
            "format": self.FORMAT,
            "version": self.version,
            "name": name,
            "sha256": _digest_of(record),
            "files": {file: _digest_of_file(self.folder / file) for file in files},
            "record": record,
        }
        self._write(self.entries / f"{name}.json", content)

    def read(self):
        """Return what can be trusted and what cannot.

        Returns:
            records: {name: record} of the whole entries, infinities as "inf".
            notes: one line for each entry that is there but not whole.
        """
        records, notes = {}, []
        for path in sorted(self.entries.glob("*.json")):
            if path.name == "format.json":
                continue
            problem, record = self._read(path)
            if problem:
                notes.append(f"{path.name} in the journal is not used: {problem}")
            else:
                records[path.stem] = record
        return records, notes

    def _read(self, path):
        try:
            content = read_json(path)
            record, files, digest = content["record"], content["files"], content["sha256"]
        except (ValueError, KeyError, TypeError, OSError):
            return "it is damaged", None
        if not isinstance(record, dict) or not isinstance(files, dict) or not isinstance(content, dict):
            return "it is damaged", None
        if content.get("version") != self.version or content.get("name") != path.stem:
            return "it is of another version or name", None
        if digest != _digest_of(record):
            return "it is damaged", None
        for file, expected in files.items():
            if not self.is_inside(file):
                return f"{file} leads out of the folder", None
            if not (self.folder / file).is_file():
                return f"{file} is missing", None
            if _digest_of_file(self.folder / file) != expected:
                return f"{file} is damaged", None
        return None, record

    def is_inside(self, file):
        """Whether a relative path stays in the folder, whatever links are on its way."""
        folder = Path(os.path.realpath(self.folder))
        return folder in Path(os.path.realpath(self.folder / file)).parents

    def _write(self, path, content):
        text = json.dumps(content, allow_nan=False)
        with atomic_path(path) as partial, open(partial, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is all there is
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _digest_of(record):
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _digest_of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
