"""A small Hopper for tests: it runs the very source of the Gluon kernels under Python, without a GPU and
without Triton's compiler, and shows what a GPU shows by chance: races, deadlocks, wrong coordinates.

Partitions of a block are threads of which one runs at a time; what the hardware does on its own (TMA loads
and stores, wgmma) is queued and happens at a moment that a seeded random choice picks: as early or as late
as the kernel's barriers allow. An mbarrier has a pending count, a byte count and a phase, and a wait sees
only the phase's parity, as on the machine. Shared memory starts as NaN. Writes of threads must be fenced
before TMA or wgmma reads them. Every global element that TMA writes is counted.

What it does not show: layouts and swizzles inside a tile, register pressure, speed.
"""

from __future__ import annotations

import math
import random
import threading
import types

import torch

_NAMES = ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait")


class MachineError(AssertionError):
    """The kernel broke a rule of the machine, or nobody can go on."""


class _Stop(BaseException):
    """Unwinds the threads of a machine that has failed."""


class Task:
    def __init__(self, block: Block, name: str, call):
        self.block, self.name, self.call = block, name, call
        self.ready = lambda: True
        self.go = threading.Semaphore(0)
        self.done = False
        self.products: list[Product] = []
        self.stores: list = []
        self.unfenced: list[torch.Tensor] = []


class Block:
    def __init__(self, number: int):
        self.number = number
        self.shared_bytes = 0


class Barrier:
    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int):
        self.count = self.pending = count

    def arrive(self, count: int = 1):
        self.pending -= count
        if self.pending < 0:
            raise MachineError("an mbarrier got more arrivals than its phase takes")
        self._turn()

    def landed(self, size: int):
        self.bytes -= size
        self._turn()

    def _turn(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Barriers(list):
    def index(self, i):
        if not 0 <= i < len(self):
            raise MachineError(f"barrier {i} of {len(self)}")
        return self[i]


def _barrier(bar) -> Barrier:
    return bar[0] if isinstance(bar, Barriers) else bar


class Shared:
    """A view of shared memory. `flat` is the whole allocation, `fresh` marks what threads wrote and did
    not fence."""

    def __init__(self, machine, flat, fresh, shape, offset=0, permuted=None):
        self.machine, self.flat, self.fresh = machine, flat, fresh
        self.shape, self.offset, self.permuted = list(shape), offset, permuted
        if offset + math.prod(shape) > flat.numel():
            raise MachineError("a view reaches beyond its allocation")

    @property
    def dtype(self):
        return self.flat.dtype

    def _of(self, flat):
        view = flat[self.offset : self.offset + math.prod(self.shape)].view(self.shape)
        return view.permute(self.permuted) if self.permuted else view

    def index(self, i):
        if not 0 <= i < self.shape[0]:
            raise MachineError(f"index {i} of {self.shape}")
        rest = self.shape[1:]
        return Shared(self.machine, self.flat, self.fresh, rest, self.offset + int(i) * math.prod(rest))

    def slice(self, start, length, dim=0):
        if dim or start % length or start + length > self.shape[0]:
            raise MachineError(f"slice {start}:{start + length} of {self.shape}: unaligned or outside")
        rest = self.shape[1:]
        return Shared(
            self.machine, self.flat, self.fresh, [length, *rest], self.offset + start * math.prod(rest)
        )

    def _reinterpret(self, dtype, shape, layout):
        if shape[-1] != self.shape[-1] or dtype != self.dtype:
            raise MachineError(f"{self.shape} seen as {shape}: only rows may be regrouped")
        return Shared(self.machine, self.flat, self.fresh, shape, self.offset)

    def permute(self, order):
        return Shared(self.machine, self.flat, self.fresh, self.shape, self.offset, list(order))

    def load(self, layout=None):
        return self._of(self.flat).clone()

    def store(self, value):
        fresh = self._of(self.fresh)
        self._of(self.flat).copy_(value)
        fresh.fill_(True)
        self.machine.task.unfenced.append(fresh)

    def for_async(self):
        if bool(self._of(self.fresh).any()):
            raise MachineError("TMA or wgmma touches what a thread wrote and did not fence")
        return self._of(self.flat)


class Product:
    """A wgmma in flight: what `warpgroup_mma` returns until it is waited for."""

    def __init__(self, a, b, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc, self.value = a, b, acc, use_acc, None

    def perform(self):
        a, b = (t.for_async() if isinstance(t, Shared) else t for t in (self.a, self.b))
        self.value = a.float() @ b.float()
        if self.use_acc:
            self.value = self.value + _settled(self.acc)


def _settled(value):
    if isinstance(value, Product):
        if value.value is None:
            raise MachineError("an accumulator was used before its product was waited for")
        return value.value
    return value


class Pointer:
    def __init__(self, flat, at=0):
        self.flat, self.at = flat, at

    def __add__(self, offset):
        return Pointer(self.flat, self.at + offset)

    def __sub__(self, offset):
        return Pointer(self.flat, self.at - offset)

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.flat.dtype)

    def indices(self, mask):
        at = torch.as_tensor(self.at)
        inside = (at >= 0) & (at < self.flat.numel())
        if not bool((inside if mask is None else inside | ~mask).all()):
            raise MachineError("a global access lies outside its tensor")
        return at


def tma_fault(address, dims, strides, box, size, swizzle) -> str | None:
    """What cuTensorMapEncodeTiled would refuse (CUDA driver API, tensor map object management), or None. Innermost
    dimension first; strides in bytes, of the dimensions after it; box of one copy."""
    if address % 16:
        return f"the address {address:#x} is not a multiple of 16"
    if not 1 <= len(dims) <= 5 or len(box) != len(dims) or len(strides) != len(dims) - 1:
        return f"{len(dims)} dimensions, {len(box)} of the box, {len(strides)} strides"
    if not all(1 <= extent <= 2**32 for extent in dims):
        return f"an extent of {dims} is 0 or over 2^32"
    if not all(stride % 16 == 0 and 0 < stride < 2**40 for stride in strides):
        return f"a stride of {strides} is no multiple of 16, or is 2^40 or more"
    if not all(1 <= extent <= 256 for extent in box):
        return f"a side of the box {box} is over 256"
    if box[0] * size % 16:
        return f"the box's rows of {box[0] * size} bytes are no multiple of 16"
    if swizzle and box[0] * size > swizzle:
        return f"the box's rows of {box[0] * size} bytes are longer than the swizzle's {swizzle}"
    # Triton passes extents and coordinates as int32.
    if max(dims) >= 2**31:
        return f"an extent of {dims} does not fit into 31 bits"
    return None


class Descriptor:
    def __init__(self, host):
        self.host = host
        size = host.base.element_size()
        swizzle = host.layout.swizzle_byte_width
        inner = min(host.block_shape[-1], swizzle // size)
        strides = [stride * size for stride in host.strides[-2::-1]]
        box = [inner, *host.block_shape[-2::-1]]
        fault = tma_fault(host.base.data_ptr(), list(host.shape)[::-1], strides, box, size, swizzle)
        if fault is not None:
            raise MachineError(f"the driver would refuse this tensor map: {fault}")
        self.block_type = types.SimpleNamespace(
            shape=list(host.block_shape), nbytes=math.prod(host.block_shape) * size
        )
        self.dtype, self.layout = host.base.dtype, host.layout

    def _box(self, coordinates):
        inside, outside = [], []
        for at, block, size in zip(coordinates, self.host.block_shape, self.host.shape, strict=True):
            low, high = max(int(at), 0), min(int(at) + block, size)
            outside.append(slice(low, max(low, high)))
            inside.append(slice(low - int(at), max(low, high) - int(at)))
        return tuple(inside), tuple(outside)

    def _view(self, base):
        return torch.as_strided(base, self.host.shape, self.host.strides)

    def read(self, coordinates):
        inside, outside = self._box(coordinates)
        box = torch.zeros(self.host.block_shape, dtype=self.dtype)
        box[inside] = self._view(self.host.base)[outside]
        return box

    def write(self, coordinates, box, written):
        inside, outside = self._box(coordinates)
        self._view(self.host.base)[outside] = box[inside]
        self._view(written)[outside] += 1


class Machine:
    """Runs `kernel[grid](**arguments)`.

    Attributes:
        written: data_ptr of a base tensor → how often each of its elements was stored by TMA.
        shared_bytes: shared memory of one block.
        products: how many wgmmas were issued.
    """

    def __init__(self, kernel, grid: int, arguments: dict, num_warps: int, seed: int):
        self.random = random.Random(seed)
        self.grid, self.num_warps = grid, num_warps
        self.written: dict[int, torch.Tensor] = {}
        self.products = 0
        self.tasks: list[Task] = []
        self.loads: list = []
        self.task: Task | None = None
        self.back = threading.Semaphore(0)
        self.failure: BaseException | None = None
        # How eager each kind of hardware is in this run.
        self.eager = {kind: self.random.choice((0.02, 0.3, 0.9)) for kind in ("load", "store", "product")}
        body = _python(kernel, self)
        arguments = {name: self._argument(value) for name, value in arguments.items()}
        self.blocks = [Block(number) for number in range(grid)]
        for block in self.blocks:
            self._spawn(block, "default", lambda: body(**arguments))
        self._run()

    @property
    def shared_bytes(self):
        return self.blocks[0].shared_bytes

    @staticmethod
    def _argument(value):
        if isinstance(value, torch.Tensor):
            whole = value.untyped_storage().nbytes() // value.element_size()
            return Pointer(value.as_strided((whole,), (1,), 0), value.storage_offset())
        return Descriptor(value) if hasattr(value, "block_shape") else value

    def _spawn(self, block, name, call) -> Task:
        task = Task(block, name, call)

        def body():
            task.go.acquire()
            try:
                if self.failure is None:
                    task.call()
            except _Stop:
                pass
            except BaseException as error:
                self.failure = self.failure or error
            task.done = True
            self.back.release()

        threading.Thread(target=body, daemon=True).start()
        self.tasks.append(task)
        return task

    def _run(self):
        while self.failure is None:
            alive = [task for task in self.tasks if not task.done]
            if not alive:
                break
            able = [task for task in alive if task.ready()]
            hardware = self._hardware()
            hasty = [act for kind, act in hardware if self.random.random() < self.eager[kind]]
            try:
                if hasty and (not able or self.random.random() < 0.5):
                    self.random.choice(hasty)()
                elif able:
                    self._resume(self.random.choice(able))
                elif hardware:
                    self.random.choice(hardware)[1]()
                else:
                    waiting = ", ".join(f"{t.name} of block {t.block.number}" for t in alive)
                    raise MachineError(f"deadlock: nobody can go on ({waiting})")
            except MachineError as error:
                self.failure = self.failure or error
        for task in self.tasks:
            while not task.done:
                self._resume(task)
        if self.failure is not None:
            raise self.failure
        if self.loads or any(task.stores for task in self.tasks):
            raise MachineError("the kernel ended with TMA operations in flight")

    def _resume(self, task):
        self.task = task
        task.go.release()
        self.back.acquire()

    def pause(self, ready=lambda: True):
        """Called by the running task: gives way until `ready()`."""
        task = self.task
        task.ready = ready
        self.back.release()
        task.go.acquire()
        if self.failure is not None:
            raise _Stop
        task.ready = lambda: True

    def _hardware(self):
        acts = [("load", lambda load=load: self._load(load)) for load in self.loads]
        for task in self.tasks:
            if task.stores:
                acts.append(("store", lambda task=task: self._store(task)))
            if task.products:
                acts.append(("product", lambda task=task: task.products.pop(0).perform()))
        return acts

    def _load(self, load):
        self.loads.remove(load)
        descriptor, coordinates, bar, target = load
        target.for_async().copy_(descriptor.read(coordinates))
        bar.landed(descriptor.block_type.nbytes)

    def _store(self, task):
        descriptor, coordinates, source = task.stores.pop(0)
        base = descriptor.host.base
        written = self.written.setdefault(base.data_ptr(), torch.zeros_like(base, dtype=torch.int32))
        descriptor.write(coordinates, source.for_async().clone(), written)


def _python(kernel, machine: Machine):
    """The Gluon function as a plain Python function whose `gl`, `tma`, … are this machine's."""
    modules: dict[int, dict] = {}

    def convert(function):
        source = function.__globals__
        if id(source) not in modules:
            modules[id(source)] = namespace = {"__builtins__": __builtins__}
            for name, value in source.items():
                if hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
                    namespace[name] = _PATCHES.get(name) or convert(value.fn)
                elif type(value).__name__ == "constexpr":
                    namespace[name] = value.value
                elif name in ("gl", "tma", "mbarrier", *_NAMES):
                    namespace[name] = _fakes(machine)[name]
                else:
                    namespace.setdefault(name, value)
        clone = types.FunctionType(
            function.__code__,
            modules[id(source)],
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        modules[id(source)][function.__name__] = clone
        return clone

    return convert(kernel.fn)


# Helpers that are inline assembly or ask for a layout, by name: what they mean.
_PATCHES = {
    "max16": lambda a, b: torch.maximum(a, b),
    "pin": lambda v: v,
    "row_above": lambda v: torch.roll(v, 1, dims=1),
    "lane_pairs": lambda k: torch.arange(4),
    "row_of_eight": lambda v: torch.arange(8).view(1, 8, 1),
}


class Number(int):
    """An integer of the kernel: it can be told to be wide."""

    def to(self, dtype):
        return self

    __add__ = __radd__ = lambda a, b: _number(int.__add__(a, b) if isinstance(b, int) else NotImplemented)
    __mul__ = __rmul__ = lambda a, b: _number(int.__mul__(a, b) if isinstance(b, int) else NotImplemented)

    def __floordiv__(self, other):
        return Number(int(self) // other)

    def __mod__(self, other):
        return Number(int(self) % other)


def _number(value):
    return value if value is NotImplemented else Number(value)


class _Layout:
    def __init__(self, *args, **kwargs):
        pass

    get_default_for = classmethod(lambda cls, *args: cls())


def _scalar(value):
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value


def _clamp(function):
    def clamp(a, b, propagate_nan=None):
        a, b = (t if isinstance(t, torch.Tensor) else torch.as_tensor(t) for t in (_settled(a), b))
        return _scalar(function(a, b.to(a.dtype) if b.dim() == 0 else b))

    return clamp


def _where(condition, a, b):
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    return torch.where(condition, a, b)


def _fakes(machine: Machine) -> dict:
    if hasattr(machine, "fakes"):
        return machine.fakes

    def allocate(dtype, shape, layout):
        if isinstance(layout, Barriers):
            machine.task.block.shared_bytes += 8 * shape[0]
            return Barriers(Barrier() for _ in range(shape[0]))
        flat = torch.empty(math.prod(shape), dtype=dtype)
        flat.fill_(float("nan") if dtype.is_floating_point else -(1 << 30))
        machine.task.block.shared_bytes += flat.numel() * flat.element_size()
        return Shared(machine, flat, torch.zeros(flat.numel(), dtype=torch.bool), shape)

    def warp_specialize(partitions, warps, registers):
        (first, arguments), *rest = partitions
        assert len(warps) == len(registers) == len(rest), "a worker without warps or registers"
        block = machine.task.block
        workers = [
            machine._spawn(block, f"{function.__name__} {i}", lambda f=function, a=args: f(*a))
            for i, (function, args) in enumerate(rest)
        ]
        first(*arguments)
        machine.pause(lambda: all(worker.done for worker in workers))

    def load(pointer, mask=None, other=0.0):
        at = pointer.indices(mask)
        if mask is None:
            return pointer.flat[at]
        return torch.where(
            mask, pointer.flat[at.where(mask, 0)], torch.tensor(other, dtype=pointer.flat.dtype)
        )

    def store(pointer, value, mask=None):
        at = pointer.indices(mask)
        at, value = torch.broadcast_tensors(at, value)
        keep = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.broadcast_to(at.shape)
        pointer.flat[at[keep]] = value[keep]
        count = machine.written.setdefault(
            pointer.flat.data_ptr(), torch.zeros_like(pointer.flat, dtype=torch.int32)
        )
        count.index_put_((at[keep],), torch.tensor(1, dtype=torch.int32), accumulate=True)

    def atomic(pointer, value, replace):
        machine.pause()
        old = int(pointer.flat[pointer.at])
        pointer.flat[pointer.at] = value if replace else old + value
        return old

    def wait(bar, phase):
        bar = _barrier(bar)
        machine.pause(lambda: bar.phase & 1 != phase)

    def arrive(bar, count=1, pred=True):
        if pred:
            _barrier(bar).arrive(count)

    def expect(bar, size):
        bar = _barrier(bar)
        bar.bytes += size
        bar.arrive()

    def copy_in(descriptor, coordinates, bar, target):
        if target.shape != descriptor.block_type.shape:
            raise MachineError(f"a TMA box {descriptor.block_type.shape} into {target.shape}")
        machine.loads.append((descriptor, [int(c) for c in coordinates], _barrier(bar), target))

    def copy_out(descriptor, coordinates, source):
        if source.shape != descriptor.block_type.shape:
            raise MachineError(f"a TMA box {descriptor.block_type.shape} from {source.shape}")
        machine.task.stores.append((descriptor, [int(c) for c in coordinates], source))

    def store_wait(n):
        task = machine.task
        machine.pause(lambda: len(task.stores) <= n)

    def fence():
        for fresh in machine.task.unfenced:
            fresh.fill_(False)
        machine.task.unfenced.clear()

    def product(a, b, acc, use_acc=True, is_async=False):
        machine.products += 1
        machine.task.products.append(Product(a, b, acc, bool(use_acc)))
        return machine.task.products[-1]

    def product_wait(n, deps):
        task = machine.task
        machine.pause(lambda: len(task.products) <= n)
        settled = tuple(d.value if isinstance(d, Product) and d.value is not None else d for d in deps)
        return settled if len(settled) > 1 else settled[0]

    gl = types.SimpleNamespace(
        constexpr=object,
        static_range=range,
        static_assert=lambda *a: None,
        num_warps=lambda: machine.num_warps,
        program_id=lambda axis=0: Number(machine.task.block.number),
        num_programs=lambda axis=0: machine.grid,
        float32=torch.float32,
        bfloat16=torch.bfloat16,
        float16=torch.float16,
        int32=torch.int32,
        int64=torch.int64,
        zeros=lambda shape, dtype, layout: torch.zeros(tuple(shape), dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(tuple(shape), value, dtype=dtype),
        arange=lambda start, end, layout=None: torch.arange(start, end),
        cast=lambda x, dtype: x,
        expand_dims=lambda t, dim: t.unsqueeze(dim),
        where=_where,
        reshape=lambda t, shape: t.reshape(shape),
        permute=lambda t, order: t.permute(order),
        join=lambda a, b: torch.stack((a, b), -1),
        split=lambda t: (t[..., 0], t[..., 1]),
        maximum=_clamp(torch.maximum),
        minimum=_clamp(torch.minimum),
        max=lambda t, axis: t.amax(axis).item(),
        convert_layout=lambda t, layout: t,
        exp=torch.exp,
        erf=torch.erf,
        load=load,
        store=store,
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
        atomic_add=lambda p, v, sem: atomic(p, v, False),
        atomic_xchg=lambda p, v, sem: atomic(p, v, True),
        NVMMADistributedLayout=_Layout,
        NVMMASharedLayout=_Layout,
        SliceLayout=_Layout,
        BlockedLayout=_Layout,
        DotOperandLayout=_Layout,
        SwizzledSharedLayout=_Layout,
    )
    machine.fakes = {
        "gl": gl,
        "tma": types.SimpleNamespace(
            async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=store_wait
        ),
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=Barriers,
            init=lambda bar, count: _barrier(bar).init(count),
            wait=wait,
            arrive=arrive,
            expect=expect,
        ),
        "fence_async_shared": fence,
        "warpgroup_mma": product,
        "warpgroup_mma_wait": product_wait,
    }
    return machine.fakes
