"""Whether a network is still the one that constants were prepared from.

Two questions, both answered without touching the device: has its structure changed (children, hooks, modes, eps), and
has any parameter or buffer (another tensor, another storage, another version)? About 60 us for a ResNet-50.
A write through `.data` that PyTorch does not count is not seen; switching train() / eval() or `refold()` renews.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_

from torch import Tensor, nn

_version = attrgetter("_version")
_training = attrgetter("training")
_eps = attrgetter("eps")


class Watch:
    """A snapshot of a module's structure and of its tensors' versions."""

    def __init__(self, root: nn.Module):
        self.modules = list(root.modules())
        self._children = [m._modules for m in self.modules]
        self._hooks = [
            h for m in self.modules for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ]
        self._tensors = [d for m in self.modules for d in (m._parameters, m._buffers)]
        self._with_eps = [m for m in self.modules if isinstance(getattr(m, "eps", None), float)]
        self._structure = self._read_structure()
        self.renew()

    def renew(self) -> None:
        """Takes the tensors as they are now."""
        self._held = self._read_tensors()
        self._pointers = list(map(Tensor.data_ptr, self._held))
        # inference tensors count no versions: what is made from them is renewed each time
        self._countless = any(t.is_inference() for t in self._held)
        self._versions = [] if self._countless else list(map(_version, self._held))

    def same_structure(self) -> bool:
        now = self._read_structure()
        return now[1:] == self._structure[1:] and _identical(now[0], self._structure[0])

    def same_tensors(self) -> bool:
        now = self._read_tensors()
        return (
            not self._countless
            and _identical(now, self._held)
            and list(map(_version, now)) == self._versions
            and list(map(Tensor.data_ptr, now)) == self._pointers
        )

    def _read_structure(self):
        children = list(chain.from_iterable(map(dict.values, self._children)))
        return (
            children,
            list(map(len, self._hooks)),
            list(map(_training, self.modules)),
            list(map(_eps, self._with_eps)),
        )

    def _read_tensors(self) -> list[Tensor]:
        return [t for t in chain.from_iterable(map(dict.values, self._tensors)) if t is not None]


def _identical(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))
