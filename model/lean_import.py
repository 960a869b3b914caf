"""Import timm faster, by leaving out two packages that timm imports and this project does not use.

    with lean_import():
        import timm

Main entry: `lean_import()`, a context manager without arguments, which yields nothing. Until the
block ends, `torch._dynamo` (torch's compiler, which loads more slowly than timm and torchvision
together) is replaced by a stand-in, and wandb (which creates a temporary folder on import) cannot
be imported. A package that is already loaded is left as it is.

The compiler is imported in two places. `torchvision.ops.roi_align` tests for compilation when
determinism is on; no classifier here calls `roi_align`. timm also marks functions of one model
(`naflexvit`) as not to be compiled; the marks matter only if this model is compiled.
`torch.compile` loads the compiler when it is called. wandb is imported by `timm.utils.summary`,
which works without wandb.
"""

import contextlib
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
    modules: dict[str, Any] = sys.modules
    hidden = "wandb" not in modules
    if hidden:
        modules["wandb"] = None  # `import wandb` now raises ImportError
    try:
        with _without_compiler():
            yield
    finally:
        if hidden:
            del modules["wandb"]


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
