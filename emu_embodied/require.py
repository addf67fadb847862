"""Optional packages: one helper that says which pip line brings a missing one."""

from importlib import import_module
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: importable name, e.g. ``"tiktoken"``.
        extra: the extra of this package that installs it, e.g. ``"emu35"``.

    Raises:
        ImportError: with the pip line, if it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ImportError(f"{module} is not installed: pip install 'emu-embodied[{extra}]'") from error
