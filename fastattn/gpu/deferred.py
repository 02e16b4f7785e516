"""Modules that are loaded when something in them is first asked for."""

from __future__ import annotations

import importlib
from typing import Any


class Deferred:
    """Stands for a module; every later access of a name costs an attribute of an object and nothing else."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        setattr(self, name, value)
        return value
