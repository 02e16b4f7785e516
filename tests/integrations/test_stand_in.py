"""Stand-ins for packages that are not there: found by Python and its metadata, undone, and never in front of others."""

import importlib
import importlib.metadata
import importlib.util
import sys

import pytest

from fastattn.integrations.stand_in import StandIn

NAME = "surely_no_such_package"


@pytest.fixture
def stand_in():
    made = StandIn(NAME, "surely-no-such-package", "1.2.3", {"": lambda: {"one": 1}, "deep.er": lambda: {"two": 2}})
    yield made
    made.uninstall()


def test_installed_and_undone(stand_in):
    assert stand_in.install() and stand_in.install() and stand_in.installed
    assert sys.meta_path.count(stand_in) == 1
    assert importlib.util.find_spec(NAME) is not None
    package = importlib.import_module(NAME)
    assert package.one == 1 and package.__version__ == "1.2.3"
    assert importlib.import_module(f"{NAME}.deep.er").two == 2 and package.deep.er.two == 2
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{NAME}.other'"):
        importlib.import_module(f"{NAME}.other")
    for name in (NAME, NAME.replace("_", "-"), NAME.upper()):
        assert importlib.metadata.version(name) == "1.2.3"
    assert importlib.metadata.packages_distributions()[NAME] == ["surely-no-such-package"]
    stand_in.uninstall()
    stand_in.uninstall()
    assert importlib.util.find_spec(NAME) is None and not any(name.startswith(NAME) for name in sys.modules)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(NAME)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(NAME)
    assert package.one == 1  # who has it keeps it


def test_a_real_package_is_left_alone(stand_in, tmp_path, monkeypatch):
    (tmp_path / f"{NAME}.py").write_text("one = 'real'")
    monkeypatch.syspath_prepend(tmp_path)
    assert not stand_in.install() and not stand_in.installed
    assert importlib.import_module(NAME).one == "real"
    del sys.modules[NAME]


def test_a_real_package_that_comes_later_is_first(stand_in, tmp_path, monkeypatch):
    assert stand_in.install()
    (tmp_path / f"{NAME}.py").write_text("one = 'real'")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module(NAME).one == "real"
    stand_in.uninstall()
    assert importlib.import_module(NAME).one == "real"  # not ours to remove
    del sys.modules[NAME]


def test_a_distribution_without_a_package_is_left_alone(stand_in, tmp_path, monkeypatch):
    """A broken installation is not papered over."""
    folder = tmp_path / "surely_no_such_package-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: surely-no-such-package\nVersion: 9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not stand_in.install()
