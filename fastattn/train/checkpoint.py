"""One file that holds a run: weights, optimizer, random state, settings, tokenizer.

The file is safetensors, so loading it runs no code and other tools can read the weights. Its metadata carry
the settings as JSON and a SHA-256 over settings and tensors. A new checkpoint is written beside the old one,
forced to the disk and renamed over it: at any moment, a kill or a power cut included, the name holds one
whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FILE_NAME = "checkpoint.safetensors"
FORMAT = "fastattn-checkpoint-1"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not the one that is needed."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name (``model.*``, ``optimizer.*``, ``rng.*``) and JSON-able state."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def section(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix.``, without it."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content as one step: readers and crashes see the old or the new, never a part."""
    # Always the same name: what a kill leaves behind, the next write takes over.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut, too
    finally:
        os.close(directory)


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode("utf-8"))
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_path(directory: Path) -> Path:
    return directory / FILE_NAME


def save(directory: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of a run, replacing the previous one.

    Raises:
        OSError: the disk is full or the folder is not writable; the previous checkpoint is then untouched.
    """
    state = json.dumps(checkpoint.state)
    metadata = {"format": FORMAT, "state": state, "sha256": _digest(checkpoint.tensors, state)}
    write_atomically(checkpoint_path(directory), safetensors.torch.save(checkpoint.tensors, metadata))


def load(directory: Path) -> Checkpoint:
    """Read and verify the checkpoint of a run; ``directory`` may also name the file.

    Raises:
        CheckpointError: there is none, it is cut short or damaged, or it was not written by fastattn.
    """
    path = directory if directory.is_file() else checkpoint_path(directory)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint in {directory}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is cut short, damaged, or no checkpoint at all ({error})") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a fastattn checkpoint (format {metadata.get('format')!r}, not {FORMAT!r})"
        )
    if metadata.get("sha256") != _digest(tensors, metadata.get("state", "")):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    return Checkpoint(tensors, json.loads(metadata["state"]))
