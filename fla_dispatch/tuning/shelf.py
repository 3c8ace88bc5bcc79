"""Files of records: one directory of one store for one environment and recurrence, as texts that are parsed on demand.

    <root>/<slug>/<toolchain>/<recurrence>/<hash>.json    one record, written whole or not at all
    <root>/<slug>/<toolchain>/<recurrence>.jsonl          a pack: one record a line

A file is found by the hash of its key, so that finding one of thousands opens one; a pack is read once, and its lines are told
apart by how they begin, as files are when their names are all that is asked. Nothing here needs pydantic.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Name(NamedTuple):
    """What a record is about; unique in one environment."""

    recurrence: str
    key: str
    direction: str

    @property
    def filename(self) -> str:
        return hashlib.sha256(f"{self.recurrence}\n{self.key}\n{self.direction}".encode()).hexdigest()[:24] + ".json"


class Text(NamedTuple):
    """A record as it was read, and where: `path` or `path:line`."""

    source: str
    content: str


# our writer's form, with no white space and no escapes to undo: told apart at a tenth of the cost of parsing a record
_BEGIN = re.compile(rb'\{"schema_version":1,"recurrence":"([^"\\]*)","key":"([^"\\]*)","direction":"(forward|backward)"')

#: Bytes of a file that hold its name in our writer's form.
_HEAD = 1024


def name_of(content: bytes, begin: int = 0, end: int | None = None) -> Name | None:
    """The name of a record from how its text begins; None if the text is no record of this version. begin, end: of its line."""
    end = len(content) if end is None else end
    found = _BEGIN.match(content, begin, end)
    try:
        if found:
            return Name(*[group.decode() for group in found.groups()])
        fields = json.loads(content[begin:end].decode())  # another writer's order of fields
    except ValueError:
        return None
    if not isinstance(fields, dict) or fields.get("schema_version") != 1:
        return None
    recurrence, key, direction = (fields.get(field) for field in Name._fields)
    if not (isinstance(recurrence, str) and isinstance(key, str) and isinstance(direction, str)):
        return None
    return Name(recurrence, key, direction)


def write_atomically(path: Path, content: str) -> None:
    """The file with this content, or an OSError and the file as it was: readers never see a part.

    No fsync: records can be measured again, and a file that a power cut emptied reads as a miss.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:  # also KeyboardInterrupt: whatever ends the writing, the part goes away and the reason goes up
        temporary.unlink(missing_ok=True)
        raise


class Unreadable(NamedTuple):
    """A file or line that is no record, and why."""

    source: str
    reason: str


class _Line(NamedTuple):
    """Where a line of a pack is, in bytes."""

    number: int
    begin: int
    end: int


class Shelf:
    """The records of one directory for one recurrence."""

    def __init__(self, environment: Path, recurrence: str) -> None:
        self.folder = environment / recurrence
        self.pack = environment / f"{recurrence}.jsonl"
        self.recurrence = recurrence
        self._whole = b""  # the pack: lines are cut out of it when they are asked for
        self._lines: dict[Name, _Line] | None = None
        self.unreadable: list[Unreadable] = []

    def get(self, name: Name) -> Text | None:
        """The text of a record, of its own file before the pack."""
        path = os.path.join(self.folder, name.filename)
        text = self._text(path, self._read(path))
        return text if text is not None else self._packed_text(name)

    def put(self, name: Name, content: str) -> Path:
        """Write a record's own file; raises OSError when the directory does not take it."""
        path = self.folder / name.filename
        write_atomically(path, content)
        return path

    def names(self) -> set[Name]:
        """Names of all records; of files that begin as ours do no more than the beginning is read."""
        return {name for path in self.files() if (name := self._name(path, self._head(path))) is not None} | self._packed().keys()

    def entries(self) -> Iterator[tuple[Name, Text]]:
        """Every record by name, as `get` finds it; what does not begin as a record goes to `unreadable`."""
        taken = set()
        for path in self.files():
            content = self._read(path)
            text = self._text(path, content)
            if text is not None:
                taken.add(os.path.basename(path))
                name = self._name(path, content)
                if name is not None:
                    yield name, text
        for name in self._packed():
            packed = None if taken and name.filename in taken else self._packed_text(name)
            if packed is not None:
                yield name, packed

    def files(self) -> list[str]:
        """Files of single records."""
        try:
            found = sorted(name for name in os.listdir(self.folder) if name.endswith(".json") and not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._report(str(self.folder), str(error))
            return []
        return [os.path.join(self.folder, name) for name in found]

    def _name(self, path: str, content: bytes | None) -> Name | None:
        """The name of a record in a file of its own, if that is the file for it."""
        if content is None:
            return None
        name = name_of(content)
        if name is not None and name.filename == os.path.basename(path):
            return name
        self._report(path, "not a record of this version" if name is None else f"a record of another key, {name.key}")
        return None

    def _head(self, path: str) -> bytes | None:
        """The beginning of a file that holds its name, or all of a file that begins otherwise."""
        try:
            with open(path, "rb", buffering=0) as file:
                head = file.read(_HEAD)
        except OSError:
            return self._read(path)
        return head if _BEGIN.match(head) else self._read(path)

    def _report(self, source: str, reason: str) -> None:
        if all(u.source != source for u in self.unreadable):
            self.unreadable.append(Unreadable(source, reason))

    def _read(self, path: str) -> bytes | None:
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._report(path, str(error))
            return None

    def _text(self, source: str, content: bytes | None) -> Text | None:
        try:
            return None if content is None else Text(source, content.decode())
        except UnicodeDecodeError as error:
            self._report(source, str(error))
            return None

    def _packed(self) -> dict[Name, _Line]:
        if self._lines is None:
            lines: dict[Name, _Line] = {}
            self._whole = self._read(str(self.pack)) or b""
            number = begin = 0
            while begin < len(self._whole):
                end = self._whole.find(b"\n", begin)
                number, end = number + 1, len(self._whole) if end < 0 else end
                name = name_of(self._whole, begin, end)
                if name is not None:
                    lines.setdefault(name, _Line(number, begin, end))
                elif self._whole[begin:end].strip():
                    self._report(f"{self.pack}:{number}", "not a record of this version")
                begin = end + 1
            self._lines = lines
        return self._lines

    def _packed_text(self, name: Name) -> Text | None:
        line = self._packed().get(name)
        return None if line is None else self._text(f"{self.pack}:{line.number}", self._whole[line.begin : line.end])
