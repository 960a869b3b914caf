"""Import the libraries of the extra `audit`: scikit-learn and matplotlib.

Main entry: `import_extra(name)` returns the module `name`, such as "sklearn.metrics"; ValueError if
it is not installed. `one_thread()` is a context manager, and a decorator, in which trees are
fitted.
"""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

from installed import why_not_imported


def import_extra(module: str) -> ModuleType:
    """Import a module of the extra `audit`.

    Raises:
        ValueError: the extra is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the audit needs the library {module.partition('.')[0]}; "
            f"{why_not_imported(error, 'audit')}"
        ) from error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit the libraries that fit trees to one thread. At this size one thread is as fast as
    several, and the trees do not depend on the number of cores.

    Raises:
        ValueError: the extra `audit` is not installed.
    """
    import_extra("sklearn.ensemble")  # a limit applies only to libraries that are loaded
    with import_extra("threadpoolctl").threadpool_limits(1):
        yield
