"""JSON documents that the library keeps for itself: each names its schema, is read whole or refused, and is written
whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastattn import env

Document = dict[str, Any]


def read(path: Path, schema: str) -> Document:
    """The document in a file; OSError where it cannot be read, ValueError where it is something else."""
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise ValueError(f"not a document of schema {schema}")
    return document


def third_layer(document: Document, root: str, layers: str) -> list[Any]:
    """What lies below three objects, one in the other, the outermost called `root`; ValueError in the words of `layers`
    where something else lies between."""
    layer = [document.get(root)]
    for _ in range(3):
        if not all(isinstance(part, dict) for part in layer):
            raise ValueError(f"{layers} must be objects")
        layer = [value for part in layer for value in part.values()]  # type: ignore[union-attr]
    return layer


def write(path: Path, document: Document) -> None:
    """In place of what is there; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def tuned(path: Path, read: Callable[[Path], Document], *, named: bool) -> Document | None:
    """What `read` makes of a file of `fastattn tune`; None where there is none, and, with a warning, where it cannot be
    used. With FASTATTN_TUNE_FILE set that is a ValueError, and so is no file if it is this one that the variable names.
    """
    try:
        return read(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        if env.tune_file_is_set() and (named or not missing):
            place = f"FASTATTN_TUNE_FILE={path}" if named else f"FASTATTN_TUNE_FILE: {path}"
            raise ValueError(f"{place} cannot be used: {error}") from error
        if not missing:
            warnings.warn(f"{path} is ignored: {error}; `fastattn tune` writes a new one", RuntimeWarning, stacklevel=3)
        return None
