"""Find, on the CPU, where code would make the host wait for a GPU.

Inside ``forbid_host_reads()`` every tensor is taken to be on a GPU, except host tensors: those that a factory makes
without ``device=`` (on a GPU's machine they are on the host, too) and what is computed from host tensors alone.
``x.to(device)`` of a host tensor gives a GPU tensor. Any op that would read a GPU tensor back, or wait for a copy to
it, raises ``HostRead``, which names the op and the line of the caller:

* values: ``item``, ``bool``, ``int``, ``float``, ``tolist``, ``numpy``, ``cpu``, ``equal``, ``allclose``, ...;
* sizes that depend on values: ``nonzero``, masks as indices, ``unique``, ``repeat_interleave`` without its size, ...;
* blocking copies, either way: ``to`` and ``copy_`` without ``non_blocking``, ``torch.tensor(..., device=)``, a list or
  a host tensor as an index; ``torch.cuda.synchronize``.

Custom ops of this package are looked into. What it cannot see: C++ that reads through addresses (the compiled CPU
engine may; on a GPU the same calls launch kernels), and a GPU tensor handed over to it. Triton's interpreter copies
every argument to the host, which a GPU would not, so its own frames are let through.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = "bgpo_kernels"  # namespace of the custom ops to look into
#: on a GPU's machine another engine stands in their place, so what they make without ``device=`` is the GPU's
_CPU_ENGINES = ("bgpo_kernels.head.cpu", "bgpo_kernels.bound.cpu")
_STATE = torch.default_generator.get_state().shape  # of a random generator: on the host, whatever it is for
_TORCH = str(Path(torch.__file__).parent)
_READS = {
    "item", "_local_scalar_dense", "is_nonzero", "equal", "allclose",
    "nonzero", "argwhere", "nonzero_numpy", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "unique_dim_consecutive", "bincount", "histogram", "_linalg_check_errors", "isin", "tensor_split",
}  # fmt: skip

_FACTORIES = (
    "tensor", "as_tensor", "from_numpy", "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn",
    "randint", "randperm",
)  # fmt: skip


class HostRead(AssertionError):
    """The host would wait for the device here."""


def _caller() -> FrameType:
    """The innermost frame that is neither torch's nor this module's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(_TORCH)):
        frame = frame.f_back
    assert frame is not None
    return frame


def _refuse(op: str) -> None:
    frame = _caller()
    if frame.f_globals.get("__name__", "").split(".")[0] == "triton":
        return
    raise HostRead(f"{op} makes the host wait for the device: {frame.f_code.co_filename}:{frame.f_lineno}")


class _Mode(TorchDispatchMode):
    """Knows the host tensors, and looks at every op before it runs."""

    def __init__(self, host: Iterable[Tensor]) -> None:
        super().__init__()
        self._host: dict[int, Tensor] = {}  # by address of the storage; kept alive, so that no address is used again
        for tensor in host:
            self.mark(tensor, on_host=True)

    def on_host(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        state = tensor.dtype == torch.uint8 and tensor.shape == _STATE
        return state or tensor.untyped_storage().data_ptr() in self._host

    def mark(self, tensor: Tensor, on_host: bool) -> None:
        address = tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0
        if on_host and address:
            self._host[address] = tensor
        else:
            self._host.pop(address, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        given = [x for x in tensors if not self.on_host(x)]
        placed = kwargs.get("device") is not None
        if name == "lift_fresh":  # made from Python numbers; `torch.tensor(..., device=)` is refused before
            given = []
        elif not tensors:  # a factory fills in the device even where the caller names none: see _making
            placed = True
        if given:
            self._look(func, name, args, kwargs, given)
        elif name == "_to_copy" and placed and not kwargs.get("non_blocking"):
            _refuse("a blocking copy to the device")
        result = self._run(func, args, kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.mark(x, on_host=not given and not placed)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.namespace != PACKAGE:
            return func(*args, **kwargs)
        with self:  # straight to the implementation, whose own ops then come here
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)

    def _look(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        """``given``: the arguments that are on the device."""
        if name in _READS:
            _refuse(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            _refuse("repeat_interleave without output_size")
        elif name in ("index", "index_put", "index_put_", "_unsafe_index"):
            self._look_at_indices(name, *args)
        elif name == "copy_" and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
            if self.on_host(args[0]) or (self.on_host(args[1]) and args[1].dim() > 0):
                _refuse("a blocking copy between host and device")
        elif name == "_to_copy" and given[0].device.type != "cpu" and kwargs.get("device") == torch.device("cpu"):
            _refuse("a copy to the host")

    def _look_at_indices(
        self, name: str, into: Tensor, places: list[Tensor | None], value: Tensor | None = None, *_accumulate: bool
    ) -> None:
        indices = [x for x in places if x is not None]
        masks = [x.dtype in (torch.bool, torch.uint8) for x in indices]
        if any(masks):
            number = value is not None and value.numel() == 1 and self.on_host(value)
            if not (number and all(masks)):  # a number under a mask is filled in, and nothing is read
                _refuse(f"{name} by a mask")
        elif not self.on_host(into) and any(self.on_host(x) for x in indices):
            _refuse(f"{name} by a list, or by indices on the host,")


def _to_device(mode: _Mode, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``Tensor.to``, which for CPU tensors never reaches the dispatcher when there is nothing to copy."""

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, Tensor):
            device = device.device
        if not isinstance(device, str | torch.device):
            return plain(self, *args, **kwargs)
        if not mode.on_host(self):
            if device == "cpu":  # spelled out, it is the host; a device passed on may be the tensor's own
                _refuse("to('cpu')")
            return plain(self, *args, **kwargs)
        if device == "cpu":
            return plain(self, *args, **kwargs)
        if not (kwargs.get("non_blocking") or True in args[1:3]):
            _refuse("a blocking copy to the device")
        moved = plain(self, *args, **kwargs).clone()
        mode.mark(moved, on_host=False)
        return moved

    return to


def _refusing(mode: _Mode, name: str) -> Callable[..., Any]:
    plain = getattr(Tensor, name)

    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not mode.on_host(self):
            _refuse(name.strip("_"))
        return plain(self, *args, **kwargs)

    return read


def _making(mode: _Mode, name: str) -> Callable[..., Tensor]:
    """A factory of torch: on the host unless it names a device."""
    plain = getattr(torch, name)

    def make(*args: Any, **kwargs: Any) -> Tensor:
        on_host = kwargs.get("device") is None
        if name in ("tensor", "as_tensor") and not isinstance(args[0], Tensor) and not on_host:
            _refuse(f"torch.{name} on a device")
        made = plain(*args, **kwargs)
        stand_in = sys._getframe(1).f_globals.get("__name__") in _CPU_ENGINES
        if on_host and not stand_in and not (args and isinstance(args[0], Tensor)):
            mode.mark(made, on_host=True)
        return made

    return make


@contextmanager
def forbid_host_reads(host: Iterable[Tensor] = ()) -> Iterator[None]:
    """Raise ``HostRead`` where the host would wait for the device. ``host``: tensors made before that are on the host.

    Several may not be nested.
    """
    mode = _Mode(host)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "cpu", "numpy", "__array__"):  # of CPU tensors, these are no ops
            patch.setattr(Tensor, name, _refusing(mode, name))
        patch.setattr(Tensor, "to", _to_device(mode, Tensor.to))
        for name in _FACTORIES:
            patch.setattr(torch, name, _making(mode, name))
        patch.setattr(torch.cuda, "synchronize", lambda *_: _refuse("torch.cuda.synchronize"))
        with mode:
            yield
