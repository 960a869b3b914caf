"""Import timm without torch's compiler, which takes longer to load than timm and torchvision do.

Two places ask for it on import: `torchvision.ops.roi_align`, for a test that it makes when it runs
under determinism, and functions of two of timm's models that are marked as not to be compiled. No
classifier here calls the first; the marks matter only to a `naflexvit` or `gemma4` that is
compiled. `torch.compile` itself loads the compiler when it is used.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

_NAMES = ("torch._dynamo", "torch._dynamo.utils")


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Until the block ends, an import of the compiler finds a stand-in; nothing, if it is loaded
    already.
    """
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
    """`torch.compiler.disable`, with or without arguments, that marks nothing."""
    return fn if callable(fn) else lambda inner: inner
