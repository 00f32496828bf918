"""Changes to a library that wait until the library is imported. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TypeAlias

Undo: TypeAlias = Callable[[], None]


class OnImport(MetaPathFinder):
    """Runs a function around the first import of a module, and then never again.

    Args:
        name: the module.
        around: called with a function that executes the module; it may do something before and after.
    """

    def __init__(self, name: str, around: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self._around = around
        self._asking_others = False

    @property
    def waits(self) -> bool:
        """Whether this object still waits for the module to be imported."""
        return self in sys.meta_path

    def wait(self) -> None:
        """Begins to wait for the import; a second call changes nothing."""
        if not self.waits:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Stops waiting, if this object waits at all."""
        if self.waits:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking_others = False
        if spec is None or spec.loader is None:
            return spec
        # Libraries also ask for the spec only to learn whether the module is installed. So the function does not run here
        # but when the module is executed.
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if not self.waits:
                execute(module)
                return
            self.stop()
            try:
                self._around(lambda: execute(module))
            except BaseException:
                self.wait()  # the next attempt to import the module may succeed
                raise

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class LibraryPatch:
    """Changes to a library that are made as soon as it is imported, and that can be undone.

    Args:
        library: the name of the library's top-level module.
        apply: makes the changes, once the library is imported. It calls its argument with a function for each change, which
            undoes that change.
        during_import: a context in which the library is imported, if that has yet to happen.
    """

    def __init__(
        self,
        library: str,
        apply: Callable[[Callable[[Undo], None]], None],
        during_import: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._apply = apply
        self._during_import = during_import
        self._undo: list[Undo] = []
        self._on_import = OnImport(library, self._import)

    def _import(self, execute: Callable[[], None]) -> None:
        with self._during_import():
            execute()
        self._apply(self._undo.append)

    def register(self) -> None:
        """Changes the library now, or as soon as it is imported; a second call changes nothing."""
        if self._undo:
            return
        if sys.modules.get(self._on_import.name) is not None:
            self._apply(self._undo.append)
        else:
            self._on_import.wait()

    def unregister(self) -> None:
        """Undoes ``register``, the last change first, and does nothing if that was never called."""
        self._on_import.stop()
        while self._undo:
            self._undo.pop()()
