"""Packages that Lightning and torch import for what no command does: loaded only when something of theirs is used.

Lightning imports TorchMetrics for its class `Metric`, and with it comes every metric, SciPy, Matplotlib and, where it
is installed, transformers. Lightning and `torch.optim` import torch's compiler to ask whether a model is compiled and
to keep the compiler away from the optimizer. Together they took half of the time that a command needs to start.

A deferred package is the package itself, whose file has not run yet. Until then it hands out the few names in
`STAND_INS`; any other name, and any submodule but those in `ALONE`, makes its file run first. So what compiles a model
or uses a metric later in the same process finds everything in its place. Only commands defer anything: what this
package's modules are imported into, such as a notebook, is left as it is.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class Deferred(ModuleType):
    """A module whose file has not run yet. Once it has, the module's class is `ModuleType` again."""

    def __getattr__(self, name: str) -> Any:
        """A stand-in, or else the attribute of the loaded module."""
        if name in STAND_INS[self.__name__]:
            with suppress(ImportError):  # another version may need more of the package than `STAND_INS` has
                return STAND_INS[self.__name__][name]()
        if name.startswith("__") and name not in ("__all__", "__version__"):  # `inspect` asks all modules for such
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        load(self)
        return getattr(self, name)


def load(module: ModuleType) -> None:
    """Run the file of a deferred module."""
    module.__class__ = ModuleType
    try:
        module.__loader__.exec_module(module)  # type: ignore[union-attr]
    except BaseException:
        module.__class__ = Deferred
        raise
    for function in _passed.pop(module.__name__, ()):
        vars(function).pop("__dynamo_disable", None)  # where torch keeps what `_disable` gave it


class _Deferring(Loader):
    """Makes a module and leaves its file for later."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.own  # type: ignore[union-attr]
        module.__class__ = Deferred


class _Present(Loader):
    """Hands out a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__
        module.__spec__ = None  # else importlib takes that spec, and runs the module's file again

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Finder(MetaPathFinder):
    """Finds what is deferred, and loads a deferred package before a submodule of it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in STAND_INS:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None:
                spec.loader = _Deferring(spec.loader)
            return spec
        package = sys.modules.get(fullname.rpartition(".")[0])
        if isinstance(package, Deferred):
            if fullname in ALONE:
                importlib.import_module(ALONE[fullname])
            else:
                load(package)
            if fullname in sys.modules:  # what was imported has imported it
                return ModuleSpec(fullname, _Present(sys.modules[fullname]))
        return None


def defer_imports() -> None:
    """Let imports of these packages load nothing from now on; what is loaded already stays."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Compiled(type):
    """The class of a stand-in for the class of compiled models: where the compiler is not loaded, no model is one."""

    def __instancecheck__(cls, instance: object) -> bool:
        compiler = sys.modules["torch._dynamo"]
        return not isinstance(compiler, Deferred) and isinstance(instance, compiler.OptimizedModule)


class OptimizedModule(metaclass=_Compiled):
    """Stands in for `torch._dynamo.OptimizedModule` in Lightning's questions whether a model is one."""


_passed: dict[str, list[Callable[..., Any]]] = {}


def _disable(fn: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    """As `torch._dynamo.disable` for a function that torch itself keeps away from the compiler."""
    _passed.setdefault("torch._dynamo", []).append(fn)
    return fn


def _plot(*values: Any, **options: Any) -> Any:
    module = importlib.import_module("torchmetrics.utilities.plot")
    if isinstance(module, Deferred):
        load(module)
    return module.plot_single_or_multi_val(*values, **options)


def _from(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


STAND_INS: dict[str, dict[str, Callable[[], Any]]] = {
    "torch._dynamo": {
        "OptimizedModule": lambda: OptimizedModule,
        "disable": lambda: _disable,
        "graph_break": lambda: lambda: None,  # outside of compiled code it does nothing
    },
    "torchmetrics": {
        "__version__": _from("torchmetrics.__about__", "__version__"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
        "Metric": _from("torchmetrics.metric", "Metric"),
        "MetricCollection": _from("torchmetrics.collections", "MetricCollection"),
    },
    "torchmetrics.utilities.plot": {
        "_AX_TYPE": lambda: object,  # of annotations, as where Matplotlib is not installed
        "_PLOT_OUT_TYPE": lambda: object,
        "plot_single_or_multi_val": lambda: _plot,
    },
}
"""Package → name → what makes the object that is handed out for it."""

ALONE = {
    "torchmetrics.__about__": "torchmetrics",
    "torchmetrics.utilities": "torchmetrics",
    "torchmetrics.metric": "torchmetrics.utilities",
    "torchmetrics.collections": "torchmetrics.utilities",
}
"""Submodules that need their package's file not to have run, but the module that is named here."""
