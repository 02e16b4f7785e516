"""Modules of ours under the names of packages that are not installed, for code that imports those.

A stand-in is the last to be asked when something is imported: a package that is there is never hidden by it. It has a
distribution, too, so that importlib.metadata, find_spec and packages_distributions() answer as for a package that is
installed: libraries decide by these.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: The contents of a module by name; made when it is imported.
Contents = Callable[[], Mapping[str, Any]]


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata says of a stand-in."""

    def __init__(self, name: str, package: str, version: str) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            "Summary: stands in for a package that is not installed: fastattn.integrations\n",
            "top_level.txt": f"{package}\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: {self.metadata['Name']} is a stand-in and has no files")


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A package and its modules.

    package: its import name. distribution, version: what importlib.metadata is to say. modules: contents of the package
    ("") and of what is in it ("layers.rotary"); packages in between are empty.
    """

    def __init__(self, package: str, distribution: str, version: str, modules: Mapping[str, Contents]) -> None:
        self.package, self.version = package, version
        self.distribution = _Distribution(distribution, package, version)
        self.modules: dict[str, Contents] = {package: dict}
        for name, contents in modules.items():
            parts = [part for part in name.split(".") if part]
            for count in range(1, len(parts)):
                self.modules.setdefault(".".join([package, *parts[:count]]), dict)
            self.modules[".".join([package, *parts])] = contents

    def install(self) -> bool:
        """Makes imports of the package find ours, process-wide.

        True when they do from now on; False when the package is installed, which is left alone. Calling it again is
        without effect. Libraries ask once whether a package is there, most when they are imported: install before.
        """
        if self.installed:
            return True
        if self._real():
            return False
        sys.meta_path.append(self)
        importlib.invalidate_caches()
        return True

    def uninstall(self) -> None:
        """Takes `install` back, without effect where nothing is installed; who imported something keeps it."""
        if not self.installed:
            return
        sys.meta_path.remove(self)
        for name in [name for name, module in sys.modules.items() if self._is_ours(module)]:
            del sys.modules[name]
        importlib.invalidate_caches()

    @property
    def installed(self) -> bool:
        return self in sys.meta_path

    def _is_ours(self, module: Any) -> bool:
        return getattr(getattr(module, "__spec__", None), "loader", None) is self

    def _real(self) -> bool:
        """Whether the package, or a distribution of its name, is there."""
        try:
            if importlib.util.find_spec(self.package) is not None:
                return True
        except ValueError:  # a module without a spec: somebody else's stand-in
            return True
        try:
            importlib.metadata.distribution(self.distribution.metadata["Name"])
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    # ---- what Python asks ----

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.modules:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in self.modules) or fullname == self.package
        return importlib.machinery.ModuleSpec(
            fullname, self, origin=f"fastattn's stand-in for {self.package}", is_package=is_package
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        contents = self.modules[module.__name__]()
        module.__dict__.update(contents)
        module.__dict__.setdefault("__doc__", f"fastattn's stand-in for {module.__name__}.")
        if module.__name__ == self.package:
            module.__dict__["__version__"] = self.version
        if contents:
            module.__dict__["__all__"] = [name for name in contents if not name.startswith("_")]

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Asked by importlib.metadata; by name, or for all (None)."""
        name = None if context is None else context.name
        own = self.distribution.metadata["Name"]
        if name is None or name.lower().replace("_", "-") == own.lower().replace("_", "-"):
            return [self.distribution]
        return []


def public(module: types.ModuleType, *names: str) -> dict[str, Any]:
    """These members of a module."""
    return {name: getattr(module, name) for name in names}
