"""The candidate protocol and registry. Every kernel of the library is a candidate; adding one changes no other file.

A backend module under fastres/backends/ subclasses `Candidate`, and calls `register` on its instances at import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastres.graph.fold import LayerParameters
from fastres.plan.pattern import Pattern
from fastres.plan.problem import Problem, Target

# A bound kernel call. Writing candidates: `launch()` computes from and into the buffers given to `bind`.
# Allocating candidates: `launch(*inputs)` takes tensors in the order of `problem.inputs` and returns one tensor, or a
# tuple in the order of `problem.outputs`.
# A launch may carry an attribute `join`, a function; consecutive launches with the same `join` are replaced by what
# `join([launch, …])` returns: one callable that performs them all (one C++ call for a run of CUDA kernels). If one of
# them fails, the exception's `index` says which.
Launch = Callable[..., Any]


@dataclass
class Buffers:
    """The memory of one kernel call, resolved.

    Attributes:
        tensors: input name ("conv.x", "expand.residual") or output role ("conv") → tensor. Activations are logical
            [N, C, H, W] in channels_last strides, dense, 16-byte aligned; [N, C] after a flat pool. Inputs that the
            candidate names in `planar` may be contiguous instead: their strides tell.
        counters: int32, as many as `Candidate.counters` asked for, zero at the start of every run; or None.
        workspace: uint8, as many bytes as `Candidate.workspace` asked for, undefined, 256-byte aligned; or None.
        donated: names of inputs that nobody reads after this call: a launch may write its result over them.
    """

    tensors: dict[str, Tensor]
    counters: Tensor | None = None
    workspace: Tensor | None = None
    donated: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)


# a kernel in a CUDA graph costs about 1.1 us beside its work (measured on an H100)
LAUNCH_MS = 0.0011


@dataclass(frozen=True)
class Work:
    """How a launch is cut: few blocks leave multiprocessors idle, and what many blocks read again comes from the L2.

    Attributes:
        blocks: equal pieces of the launch.
        l2_bytes: what one of them reads, weights and input alike, as often as it reads them.
    """

    blocks: int
    l2_bytes: int

    @classmethod
    def product(cls, m: int, n: int, depth: int, block_m: int, block_n: int, itemsize: int) -> Work:
        """[m, depth] times [depth, n] in tiles of block_m x block_n."""
        blocks = -(-m // block_m) * -(-n // block_n)
        return cls(blocks, (block_m + block_n) * depth * itemsize)

    def ms(self, problem: Problem, target: Target) -> float:
        """Rounds of one block a multiprocessor, which has its share of the L2's bandwidth and of the arithmetic; 0
        where the device's rates are unknown."""
        rate = target.rate(problem.dtype)
        if not rate or not self.blocks:
            return 0.0
        arithmetic = 1e3 * target.sms * problem.flops / self.blocks / rate
        return -(-self.blocks // target.sms) * max(target.l2_ms(target.sms * self.l2_bytes), arithmetic)


class Candidate:
    """One way to compute one pattern. Subclasses set the class attributes and override what they need.

    Attributes:
        name: "backend.kernel", unique, e.g. "triton.conv_bn_act": the kernel's file under kernels/ bears the last part.
        backend: the family it belongs to: "reference", "onednn", "cpu", "cudnn", "triton", "hopper", "cuda".
        pattern: what it covers.
        source: the file that holds its device code, or the PyTorch call that it makes; shown in reports.
        efficiency: the share of the roofline that `estimate_ms` assumes; 0.5 for kernels that were never measured.
        allocates: its launches return fresh tensors instead of writing into given buffers.
    """

    name: str = ""
    backend: str = ""
    pattern: Pattern
    source: str = ""
    allocates: bool = False
    efficiency: float = 0.5

    def accepts(self, problem: Problem, target: Target) -> str | None:
        """None if it can compute `problem` on `target`, else the reason why not, as a phrase."""
        raise NotImplementedError

    def configs(self, problem: Problem, target: Target) -> Sequence[Any]:
        """Configurations worth trying, the heuristic's choice first: frozen dataclasses with `to_dict`-able fields
        (ints, bools, strings), or `(None,)` where there is nothing to choose."""
        return (None,)

    def busiest_ms(self, problem: Problem, target: Target) -> float:
        """What the multiprocessor with the most work takes at least, with the heuristic's configuration; 0 where the
        work can be cut as fine as one likes."""
        return 0.0

    def least_ms(self, problem: Problem, target: Target) -> float:
        """Below this no time is believed that was not measured for this very problem."""
        return max(target.floor_ms(problem) or 0.0, self.busiest_ms(problem, target)) + LAUNCH_MS

    def estimate_ms(self, problem: Problem, target: Target) -> float:
        """A guess of the time where no table has one: it only has to rank candidates, and must not flatter them."""
        floor = target.floor_ms(problem)
        if floor is None:
            floor = 1e-9 * problem.flops + 1e-7 * problem.bytes
        return max(floor, self.busiest_ms(problem, target)) / self.efficiency + LAUNCH_MS

    def planar(self, problem: Problem) -> frozenset[str]:
        """Names of inputs that it reads contiguous ([N, C, H, W] in memory) as well as channels_last: what comes from
        outside in that order is then handed over as it lies, where others get a copy in channels_last."""
        return frozenset()

    def counters(self, problem: Problem, config: Any) -> int:
        """How many int32 counters a launch needs, zeroed at the start of every run."""
        return 0

    def workspace(self, problem: Problem, config: Any) -> int:
        """How many bytes of scratch memory a launch needs."""
        return 0

    def prepare(self, problem: Problem, config: Any, parameters: Mapping[str, LayerParameters]) -> Any:
        """Constants (tensors on the parameters' device) from the layers' parameters, by role. Called again when any of
        them has changed. The result is shared by every problem for which `prepare_key` is equal."""
        return None

    def prepare_key(self, problem: Problem, config: Any) -> Any:
        """What of (problem, config) the constants depend on; the batch and image size normally do not."""
        return (problem.dtype,)

    def kernels(
        self, problem: Problem, config: Any, buffers: Buffers, constants: Any
    ) -> Sequence[tuple[Any, Mapping[str, Any], Mapping[str, Any]]]:
        """The Triton kernels that `bind` compiles, as (kernel, all of its arguments by name, compile options). Buffers
        and constants may be on the meta device: what is compiled must not depend on the device."""
        return ()

    @property
    def compiles(self) -> bool:
        """Whether there are any."""
        return type(self).kernels is not Candidate.kernels

    def bind(self, problem: Problem, config: Any, buffers: Buffers, constants: Any) -> Launch:
        """Everything resolved (pointers, descriptors, grid) into a callable. It runs on the current stream."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.name


@dataclass
class Registry:
    candidates: dict[str, Candidate] = field(default_factory=dict)

    def register(self, candidate: Candidate) -> Candidate:
        if candidate.name in self.candidates:
            raise ValueError(f"candidate {candidate.name!r} is registered already")
        self.candidates[candidate.name] = candidate
        return candidate

    def patterns(self) -> list[Pattern]:
        return list(dict.fromkeys(candidate.pattern for candidate in self.candidates.values()))

    def for_pattern(self, pattern: Pattern) -> list[Candidate]:
        return [c for c in self.candidates.values() if c.pattern == pattern]

    def __getitem__(self, name: str) -> Candidate:
        return self.candidates[name]


REGISTRY = Registry()
register = REGISTRY.register
