"""Import timm without what it asks for and is not used here.

That is torch's compiler, which takes longer to load than timm and torchvision do, and wandb, which
makes a temporary folder when it is imported.

Two places ask for the compiler: `torchvision.ops.roi_align`, for a test that it makes when it runs
under determinism, and functions of two of timm's models that are marked as not to be compiled. No
classifier here calls the first; the marks matter only to a `naflexvit` or `gemma4` that is
compiled. `torch.compile` itself loads the compiler when it is used. `timm.utils.summary` asks for
wandb, and does without.
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
    """Until the block ends, an import of the compiler finds a stand-in, and one of wandb nothing;
    what is loaded already stays.
    """
    modules: dict[str, Any] = sys.modules
    hidden = "wandb" not in modules
    if hidden:
        modules["wandb"] = None  # an import of it raises ImportError
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
    """`torch.compiler.disable`, with or without arguments, that marks nothing."""
    return fn if callable(fn) else lambda inner: inner
