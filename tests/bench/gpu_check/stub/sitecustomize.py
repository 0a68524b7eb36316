"""Stand-ins for packages that the machine with the GPU lacks and the GPU check never calls.

Python imports this module by itself when its folder is on the path.
"""

import importlib.abc
import importlib.machinery
import sys
import types

MISSING = ("lance", "lancedb", "ray", "backports")


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn

    def __or__(cls, other):
        return cls

    __ror__ = __or__

    def __getitem__(cls, _):
        return cls


class StandIn(metaclass=_Anything):
    """Whatever is imported: it may stand in a type, and may not be called."""

    def __init__(self, *args, **kwargs):
        raise RuntimeError("a stand-in was called: this needs the real package")


class _Module(types.ModuleType):
    __path__ = ()
    __version__ = "stand-in"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
