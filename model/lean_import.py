"""Import timm and torchmetrics faster: without what they load and this project does not use.

    with lean_import():
        import timm

Main entries: `lean_import()`, a context manager without arguments, which yields nothing. Until the
block ends, `torch._dynamo` (torch's compiler, which loads more slowly than timm and torchvision
together) is replaced by a stand-in, and wandb (which creates a temporary folder on import) cannot
be imported. A package that is already loaded is left as it is.

The compiler is imported in four places. `torchvision.ops.roi_align` tests for compilation when
determinism is on; no classifier here calls `roi_align`. timm also marks functions of one model
(`naflexvit`) as not to be compiled; the marks matter only if this model is compiled. An optimizer
marks its own methods when it is made; they are called outside of compiled networks. (Steps of AdamW
still load the compiler, steps of L-BFGS do not.) Its `state_dict()` and the functions that compute
shapes on the meta device are marked when they are first called; no compiled network calls them.
`torch.compile` loads the compiler when it is called. wandb is imported by `timm.utils.summary`,
which works without wandb.

`import_part(package, part)` imports `package.part` without the rest of the package, whose other
parts are not needed, and returns the module. It is for packages that load all of their parts at
once, such as torchmetrics with its metrics of texts and sounds. If the part cannot be imported by
itself, or the package is already loaded, it is imported as usual.

`without(*packages)` is a context manager that blocks the import of the named packages, as
`lean_import()` does with wandb. It is for optional dependencies, such as boto3, which TensorBoard
loads for folders on S3.
"""

import contextlib
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

_NAMES = ("torch._dynamo", "torch._dynamo.utils")


@contextlib.contextmanager
def lean_import() -> Iterator[None]:
    """Replace torch's compiler by a stand-in and block the import of wandb until the block ends. A
    package that is already loaded is left as it is.
    """
    with without("wandb"), _without_compiler():
        yield


@contextlib.contextmanager
def without(*packages: str) -> Iterator[None]:
    """Block the import of `packages` until the block ends: as if they were not installed. Loaded
    packages are left as they are.
    """
    modules: dict[str, Any] = sys.modules
    hidden = [package for package in packages if package not in modules]
    modules.update(dict.fromkeys(hidden))  # None makes `import` raise ImportError
    try:
        yield
    finally:
        for package in hidden:
            del modules[package]


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    if _NAMES[0] in sys.modules:
        yield
        return
    package: Any
    inner: Any
    package, inner = (types.ModuleType(name) for name in _NAMES)
    package.__path__ = []
    package.utils = inner
    package.disable = _unmarked
    inner.is_compile_supported = lambda _device: False
    sys.modules.update(zip(_NAMES, (package, inner), strict=True))
    disable, torch.compiler.disable = torch.compiler.disable, _unmarked
    try:
        yield
    finally:
        torch.compiler.disable = disable
        for name in _NAMES:
            del sys.modules[name]


def _unmarked(fn: Any = None, *_how: Any, **_named: Any) -> Any:
    """Replace `torch.compiler.disable` by a decorator, with or without arguments, that does
    nothing.
    """
    return fn if callable(fn) else lambda inner: inner


def import_part(package: str, part: str) -> Any:
    """Return the module `package.part`, imported without the other parts of `package` if possible.

    Modules of `package` that this loads are not kept for other imports.

    Raises:
        ImportError: there is no such module.
    """
    name = f"{package}.{part}"
    if package not in sys.modules:
        with contextlib.suppress(ImportError, AttributeError):
            return _import_alone(package, name)
    return importlib.import_module(name)


def _import_alone(package: str, name: str) -> types.ModuleType:
    """Import a module without running the `__init__.py` of the packages that it is in."""
    try:
        for end in [i for i, letter in enumerate(name) if letter == "."]:
            spec = importlib.util.find_spec(name[:end])
            if spec is None:
                raise ImportError(f"no package {name[:end]}")
            outer: Any = importlib.util.module_from_spec(spec)
            outer._logger = logging.getLogger(package)  # as in torchmetrics/__init__.py
            sys.modules[name[:end]] = outer
        return importlib.import_module(name)
    finally:
        # Remove these incomplete modules, so that a later import loads the whole package.
        for module in [key for key in sys.modules if f"{key}.".startswith(f"{package}.")]:
            del sys.modules[module]
