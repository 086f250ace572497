"""A module's own forward over other submodules: how a network runs that cannot be traced as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class Parts:
    """Shells of a module and of those descendants that are not exchanged; parameters, buffers and hooks are shared.

    What the forward writes on itself is the module's: plain attributes are carried over before a call and after.

    Args:
        module: stays as it is.
        exchange: (descendant) → what takes its place, or None to look at its own children.
    """

    def __init__(self, module: nn.Module, exchange: Callable[[nn.Module], nn.Module | None]):
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._made: dict[nn.Module, nn.Module] = {}
        self._lock = threading.Lock()
        self.exchange = exchange
        self.root = self._shell(module)

    def _shell(self, module: nn.Module) -> nn.Module:
        shell = object.__new__(type(module))
        object.__setattr__(shell, "__dict__", dict(module.__dict__))
        self._made[module] = shell
        self._pairs.append((module, shell))
        shell.__dict__["_modules"] = {
            name: None if child is None else self._place(child) for name, child in module._modules.items()
        }
        return shell

    def _place(self, child: nn.Module) -> nn.Module:
        if child not in self._made:
            made = self.exchange(child)
            if made is None and not any(True for _ in child.children()):
                made = child
            self._made[child] = self._shell(child) if made is None else made
        return self._made[child]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._carry(from_shells=False)
        try:
            root = self.root
            return type(root).forward(root, *args, **kwargs)
        finally:
            self._carry(from_shells=True)

    def _carry(self, from_shells: bool) -> None:
        with self._lock:
            for module, shell in self._pairs:
                source, target = (shell, module) if from_shells else (module, shell)
                have, want = target.__dict__, source.__dict__
                for name, value in want.items():
                    if name != "_modules" and have.get(name, _ABSENT) is not value:
                        have[name] = value
                for name in [name for name in have if name not in want]:
                    del have[name]

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.root.named_modules()


_ABSENT = object()
