"""Whether a network is still the one that constants were prepared from.

Two questions, both answered without touching the device: has its structure changed (children, hooks, modes, eps, plain
attributes), and has any parameter or buffer (another tensor, another storage, another version)?
A write through `.data` that PyTorch does not count is not seen; switching train() / eval() or `refold()` renews.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_

from torch import Tensor, nn

_version = attrgetter("_version")
_training = attrgetter("training")
_eps = attrgetter("eps")
_window = attrgetter("stride", "padding", "dilation", "groups", "padding_mode")


class Watch:
    """A snapshot of a module's structure and of its tensors' versions.

    Args:
        apart: modules that are called as they are: what they keep on themselves is their own business.
    """

    def __init__(self, root: nn.Module, apart: Iterable[nn.Module] = ()):
        self.modules = list(root.modules())
        aside = {m for whole in apart for m in whole.modules()}
        inside = [m for m in self.modules if m not in aside]
        self._children = [m._modules for m in self.modules]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(m, kind) for m in self.modules for kind in kinds]
        # attributes of the user's own classes, and what a convolution's shapes follow from
        self._own = [vars(m) for m in inside if not type(m).__module__.startswith("torch.")]
        self._attributes = list(map(vars, inside))
        self._convs = [m for m in inside if isinstance(m, nn.Conv2d)]
        self._tensors = [d for m in self.modules for d in (m._parameters, m._buffers)]
        self._with_eps = [m for m in self.modules if isinstance(getattr(m, "eps", None), float)]
        self._structure = self._read_structure()
        self.renew()

    def renew(self) -> None:
        """Takes the tensors as they are now."""
        self._held = self._read_tensors()
        # their memory stays taken: a parameter that is pointed elsewhere, twice, cannot come back to the same address
        self._storages = [t.detach() for t in self._held]
        self._pointers = list(map(Tensor.data_ptr, self._held))
        # inference tensors count no versions: what is made from them is renewed each time
        self._countless = any(t.is_inference() for t in self._held)
        self._versions = [] if self._countless else list(map(_version, self._held))

    def moved(self) -> bool:
        """Whether a tensor is another one, or lies elsewhere."""
        now = self._read_tensors()
        return not _identical(now, self._held) or list(map(Tensor.data_ptr, now)) != self._pointers

    @property
    def modes(self) -> tuple[bool, ...]:
        """Whether each module was in training, when the snapshot was taken."""
        return self._structure[2]

    def modes_now(self) -> tuple[bool, ...]:
        return tuple(map(_training, self.modules))

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
        children = list(chain.from_iterable(map(dict.values, chain(self._children, self._own))))
        return (
            children,
            list(map(len, self._hooks)),
            self.modes_now(),
            list(map(_eps, self._with_eps)),
            list(map(_window, self._convs)),
            list(map(len, self._attributes)),
        )

    def _read_tensors(self) -> list[Tensor]:
        return [t for t in chain.from_iterable(map(dict.values, self._tensors)) if t is not None]


def _identical(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))
