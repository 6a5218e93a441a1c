"""Names of classes: where a pipeline keeps them, files that hold them, and choosing classes by them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqdit.errors import CheckpointError, UsageError
from hqdit.models.source import PIPELINE_INDEX_NAME, ModelFolder
from hqdit.models.weights import read_json

#: Key of a pipeline's index, and of a classifier's configuration: number as text -> names, separated by commas.
ID2LABEL = "id2label"

_FORMS = "one line per class, a JSON list, or a JSON object from numbers to names, by itself or under id2label"


def class_names(folder: ModelFolder) -> dict[int, str]:
    """Number -> names of the classes of a pipeline folder; empty where it has none.

    Raises:
        CheckpointError: a broken index, or entries that are no names.
    """
    if not folder.is_pipeline or not (folder.root / PIPELINE_INDEX_NAME).exists():
        return {}
    path = folder.root / PIPELINE_INDEX_NAME
    labels = read_json(path, "a pipeline's model_index.json").get(ID2LABEL)
    return {} if labels is None else _by_number(labels, path)


def read_class_names(path: Path, count: int) -> dict[int, str]:
    """Number -> names of the classes 0 to `count` - 1 in a file: lines, a JSON list, or a JSON object.

    Raises:
        CheckpointError: another form, or not exactly these classes.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: found no such file, needed names of classes. Fix: check --class-names")
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if text.lstrip()[:1] in ("{", "[") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: found a file that cannot be read ({str(error) or type(error).__name__}), needed names of "
            f"classes: {_FORMS}. Fix: correct it"
        ) from error
    if isinstance(content, Mapping):
        content = content.get(ID2LABEL, content)
    names = _by_number(dict(enumerate(content)) if isinstance(content, list) else content, path)
    if sorted(names) != list(range(count)):
        raise CheckpointError(
            f"{path}: found names of {len(names)} classes, needed those of the model's {count}, 0 to {count - 1}: "
            f"{_FORMS}. Fix: name the file that belongs to this model"
        )
    return names


def _by_number(labels: Any, where: Path) -> dict[int, str]:
    if not isinstance(labels, Mapping):
        raise CheckpointError(f"{where}: found a {type(labels).__name__}, needed {_FORMS}. Fix: correct it")
    names = {}
    for number, name in labels.items():
        if not re.fullmatch("[0-9]{1,9}", str(number)) or not isinstance(name, str) or not name.strip():
            raise CheckpointError(
                f"{where}: found the class {number!r:.60} with the name {name!r:.60}, needed a number and a text. "
                "Fix: correct the file"
            )
        names[int(number)] = name.strip()
    return names


def choose_classes(text: str, names: Mapping[int, str]) -> list[int]:
    """The classes of a comma-separated list of numbers and names, such as "golden retriever, 3".

    Args:
        text: names are compared without regard to case; a class with several names answers to each of them.
        names: of the model's classes, see `class_names`; may be empty.

    Raises:
        UsageError: an entry that is neither, or a name of more than one class.
    """
    numbers_of: dict[str, list[int]] = {}
    for number, several in names.items():
        for name in {part.strip().casefold() for part in several.split(",")}:
            numbers_of.setdefault(name, []).append(number)
    return [_choose(part.strip(), text, numbers_of) for part in text.split(",")]


def _choose(entry: str, text: str, numbers_of: Mapping[str, list[int]]) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,1000}", entry):
        return int(entry)
    found = numbers_of.get(entry.casefold(), [])
    if len(found) == 1:
        return found[0]
    shown = repr(text) if entry == text else f"{entry!r} in {text!r}"
    if found:
        raise UsageError(
            f"--classes: found {shown}, which the classes {', '.join(map(str, found))} are called, needed one class. "
            f"Fix: name it by its number, for example --classes {found[0]}"
        )
    if not numbers_of:
        raise UsageError(
            f"--classes: found {shown}, needed comma-separated numbers, because the model has no names of classes. "
            "Fix: for example --classes 0,1,2"
        )
    close = difflib.get_close_matches(entry.casefold(), numbers_of, n=3)
    fix = f"is it {', '.join(map(repr, close))}?" if close else "for example --classes 0,1,2"
    raise UsageError(
        f"--classes: found {shown}, needed comma-separated numbers or names of the model's classes. Fix: {fix}"
    )
