"""Tensors in safetensors files, one at a time: read and checked, overwritten in place, written one by one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


class AdapterFormatError(ValueError):
    """A file from elsewhere is not what it has to be; the message names the file and the key."""


@dataclass(frozen=True)
class TensorEntry:
    """A line of a safetensors header.

    Args:
        dtype: As safetensors names it, such as `"F32"`.
        shape: Of the tensor.
        start: Offset of its first byte in the file.
        nbytes: Its size, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """A safetensors file whose tensors are read and overwritten one at a time; nothing is mapped or kept.

    Args:
        path: The file.

    Attributes:
        entries: Key -> where its tensor lies.
        bytes_read, bytes_written: Traffic of tensors through this object so far.

    Raises:
        AdapterFormatError: If the file is not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_header(path)
        self.bytes_read = self.bytes_written = 0

    def read(self, key: str) -> torch.Tensor:
        """A floating-point tensor in its own dtype.

        Raises:
            AdapterFormatError: If it is of another kind, is cut off, or holds NaN or Inf.
        """
        entry = self.entries[key]
        if entry.dtype not in FLOATS:
            raise AdapterFormatError(
                f"`{key}` in `{self.path}` is of the dtype {entry.dtype}. Allowed: {', '.join(FLOATS)}."
            )
        content = bytearray(entry.nbytes)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(content) != entry.nbytes:
                raise AdapterFormatError(f"`{self.path}` ends within `{key}`. Fetch the file again.")
        self.bytes_read += entry.nbytes
        dtype = FLOATS[entry.dtype]
        tensor = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        # NaN and Inf survive a sum, which is one pass; only if it overflows is a second look needed.
        if not bool(tensor.sum(dtype=torch.float64).isfinite()) and not bool(torch.isfinite(tensor).all()):
            raise AdapterFormatError(
                f"`{key}` in `{self.path}` holds NaN or Inf, which would poison the mean. Leave this one out, or have "
                "it trained anew."
            )
        return tensor.reshape(entry.shape)

    def overwrite(self, key: str, tensor: torch.Tensor) -> None:
        """Put a tensor of the same shape and dtype in the place of one."""
        entry = self.entries[key]
        if tuple(tensor.shape) != entry.shape or tensor.dtype != FLOATS.get(entry.dtype):
            raise ValueError(
                f"`{key}` in `{self.path}` is {entry.dtype} of shape {entry.shape}, and what should replace it is "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}."
            )
        with self.path.open("r+b") as file:
            file.seek(entry.start)
            self.bytes_written += file.write(as_bytes(tensor))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes as safetensors stores them: row by row, little-endian."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        with safe_open(path, framework="pt") as checked:  # its offsets tile the file, its shapes fit its offsets
            keys = set(checked.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise AdapterFormatError(
            f"`{path}` is not a valid safetensors file ({error}). Fetch it again, or write it again with "
            "`save_pretrained`."
        ) from error
    header.pop("__metadata__", None)
    if keys != header.keys():
        raise AdapterFormatError(f"The header of `{path}` can be read in two ways. Write the file again.")
    return {
        key: TensorEntry(
            value["dtype"],
            tuple(value["shape"]),
            8 + length + value["data_offsets"][0],
            value["data_offsets"][1] - value["data_offsets"][0],
        )
        for key, value in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AdapterFormatError: If the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFormatError(f"`{path}` cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"`{path}` holds a {type(value).__name__}. Allowed: a JSON object.")
    return value


def weight_files(directory: Path) -> tuple[str, ...]:
    """Names of a model's safetensors files.

    Raises:
        AdapterFormatError: If there are none, or the index names something that is not a plain file name.
    """
    if (directory / MODEL).is_file():
        return (MODEL,)
    if not (directory / INDEX).is_file():
        raise AdapterFormatError(
            f"`{directory}` has neither `{MODEL}` nor `{INDEX}`. Pickled weights are never read; write the model anew "
            "with `AutoModel.from_pretrained(...).save_pretrained(...)` of a current transformers."
        )
    named = read_json(directory / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise AdapterFormatError(f"`{directory / INDEX}` has no `weight_map`. Fetch or write it again.")
    for key, name in named.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise AdapterFormatError(
                f"`{directory / INDEX}` says that `{key}` lies in {name!r}. Allowed: the plain name of a safetensors "
                "file beside the index; a path could lead out of the directory."
            )
    return tuple(sorted(set(named.values())))


class BaseWeights:
    """The tensors of a model directory, in however many safetensors files.

    Args:
        directory: Of the model.

    Raises:
        AdapterFormatError: If the files are not valid, or the same key lies in two of them.
    """

    def __init__(self, directory: Path) -> None:
        self.files = [TensorFile(directory / name) for name in weight_files(directory)]
        self.where: dict[str, TensorFile] = {}
        for file in self.files:
            for key in file.entries:
                if key in self.where:
                    raise AdapterFormatError(f"`{key}` lies both in `{self.where[key].path}` and in `{file.path}`.")
                self.where[key] = file

    def key_of(self, name: str, prefix: str) -> str | None:
        """The key of a parameter: its name, or its name with or without the model's prefix."""
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((key for key in candidates if key in self.where), None)

    def read(self, key: str) -> torch.Tensor:
        """A tensor in its own dtype."""
        return self.where[key].read(key)

    def overwrite(self, key: str, tensor: torch.Tensor) -> None:
        """Put another tensor of the same shape and dtype in its place."""
        self.where[key].overwrite(key, tensor)


class TensorWriter:
    """Writes a safetensors file tensor by tensor; the header is filled in at the end, into room left for it.

    Args:
        path: The file.
        keys: All keys that will be added.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.file = path.open("wb")
        # A key's line: dtype, two offsets of up to 20 digits and the sizes of up to 8 dimensions.
        self.room = 8 * math.ceil((64 + sum(len(json.dumps(key)) + 256 for key in keys)) / 8)
        self.file.write(b" " * (8 + self.room))
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.size = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Append a floating-point tensor."""
        dtype = next(name for name, each in FLOATS.items() if each == tensor.dtype)
        end = self.size + tensor.nbytes
        self.header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [self.size, end]}
        self.file.write(as_bytes(tensor))
        self.size = end

    def finish(self) -> None:
        """Write the header."""
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little"))
        self.file.write(json.dumps(self.header).encode().ljust(self.room))
        self.file.close()
