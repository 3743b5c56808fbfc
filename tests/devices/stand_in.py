"""A simulated GPU that finds tensors left on the host and device synchronizations, without a GPU.

Tensors "on cuda:0" are CPU tensors whose storage is labelled. `start()` makes torch report GPUs, so
that the program takes its GPU branches, and runs every torch call under two modes. One handles
device arguments and device properties; the other propagates labels through the operators, also in
autograd and in our own ops. As on a GPU, operators and collectives that mix devices raise. Places
where the host would wait for the device are counted in `WAITS`, by the innermost function of this
project. Not supported: Triton kernels (ops run in torch), graphs, streams, NCCL, memory.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.utils._device
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PROJECT = Path(__file__).parents[2] / "fastrlhf"
WAITS: collections.Counter[str] = collections.Counter()
"""Number of times that the host waited for the device, by "file:function" of the project."""

_labels: dict[int, StorageWeakRef] = {}
_CROSSING = {"aten::copy_", "aten::_to_copy", "aten::set_"}
_READING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


_ANSWERS = {
    torch.Tensor.device.__get__: lambda gpu: CUDA if gpu else CPU,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda gpu: gpu,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda gpu: not gpu,  # type: ignore[attr-defined]
}


class DeviceError(RuntimeError):
    """An operation that raises on a real GPU."""


# ---- labels --------------------------------------------------------------------------------------


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        return tensor.untyped_storage()


def on_gpu(tensor: Tensor) -> bool:
    label = _labels.get(_storage(tensor)._cdata)
    return label is not None and not label.expired()


def _label(result: Any, gpu: bool) -> None:
    for tensor in tree_leaves(result):
        if isinstance(tensor, Tensor) and gpu:
            storage = _storage(tensor)
            _labels[storage._cdata] = StorageWeakRef(storage)
        elif isinstance(tensor, Tensor):
            _labels.pop(_storage(tensor)._cdata, None)


def _names_gpu(device: object) -> bool:
    return (
        torch.device(device).type == "cuda"
        if isinstance(device, str | torch.device)
        else isinstance(device, int)
    )


def _wait() -> None:
    frame = sys._getframe(1)
    while frame is not None and PROJECT not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None:
        code = frame.f_code
        WAITS[f"{Path(code.co_filename).relative_to(PROJECT)}:{code.co_name}"] += 1


# ---- the two modes -------------------------------------------------------------------------------


class _Move(torch.autograd.Function):
    """Copy to the other device; the gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gpu: bool) -> Tensor:
        ctx.gpu = gpu
        moved = x.clone()
        _label(moved, gpu)
        return moved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        back = gradient.clone()
        _label(back, not ctx.gpu)
        return back, None


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    **_: Any,
) -> None:
    """Run the part of torch.autograd.backward that is used here, without entering modes again."""
    roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    given = (
        tuple(grad_tensors)
        if isinstance(grad_tensors, list | tuple)
        else (grad_tensors,) * len(roots)
    )
    given = torch.autograd._make_grads(roots, given, is_grads_batched=False)
    keep = create_graph if retain_graph is None else retain_graph
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.run_backward(
        roots, given, keep, create_graph, (), allow_unreachable=True, accumulate_grad=True
    )


class Calls(TorchFunctionMode):
    """Mode for Python calls of torch: handles device arguments and device properties."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func in _ANSWERS:
            return _ANSWERS[func](on_gpu(args[0]))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return name.replace("torch.", "torch.cuda.", 1) if on_gpu(args[0]) else name
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self._moved(func, *args, **kwargs)
        if func in (torch.Tensor.backward, torch.autograd.backward):
            with self:  # a mode is disabled while it handles a call
                return _backward(*args, **kwargs)
        if func is torch.Tensor.numpy and on_gpu(args[0]):
            raise DeviceError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.tolist and on_gpu(args[0]):
            _wait()
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        gpu = _names_gpu(kwargs["device"])
        made = func(*args, **{**kwargs, "device": CPU})
        _label(made, gpu)
        return made

    def _moved(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("non_blocking", None)
        device: Any = {torch.Tensor.cuda: CUDA, torch.Tensor.cpu: CPU}.get(
            func, kwargs.pop("device", None)
        )
        rest = []
        for arg in args if func is torch.Tensor.to else ():
            if isinstance(arg, Tensor):
                device = CUDA if on_gpu(arg) else CPU
                rest.append(arg.dtype)
            elif isinstance(arg, str | torch.device):
                device = arg
            else:
                rest.append(arg)
        converted = torch.Tensor.to(x, *rest, **kwargs) if rest or kwargs else x
        if device is None or _names_gpu(device) == on_gpu(x):
            return converted
        if on_gpu(x):
            _wait()
        return _Move.apply(converted, not on_gpu(x))


class Operators(TorchDispatchMode):
    """Mode for operators, including autograd's: labels results and checks operands."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_host = [t for t in operands if not on_gpu(t)]
        if len(on_host) < len(operands):
            self._check(name, args, operands, on_host)
        elif name.startswith("c10d::") and name != "c10d::barrier" and operands:
            raise DeviceError(f"{name}: NCCL does not support tensors on the CPU")
        result = func(*args, **kwargs)
        # The storage of in-place results and views is labelled already.
        known = {_storage(t)._cdata for t in operands}
        new = [
            t
            for t in tree_leaves(result)
            if isinstance(t, Tensor) and _storage(t)._cdata not in known
        ]
        _label(new, len(on_host) < len(operands))
        return result

    def _check(self, name: str, args: tuple, operands: list[Tensor], on_host: list[Tensor]) -> None:
        """Check operands of which at least one is on the GPU, and count waits."""
        if name in _INDEXING:
            if not on_gpu(args[0]):
                raise DeviceError(
                    f"{name}: indices are on cuda:0, but the indexed tensor is on the CPU"
                )
            # x[mask] = 0 is a masked_fill.
            fills = name != "aten::index" and len(operands) == 3 and operands[2].dim() == 0
            if not fills and any(t.dtype in (torch.bool, torch.uint8) for t in operands[1:]):
                _wait()  # to read the number of True elements
        elif name == "aten::copy_":
            if not on_gpu(args[0]):
                _wait()
        elif name in _READING:
            _wait()
        elif name not in _CROSSING and any(t.dim() > 0 for t in _without_scalars(name, on_host)):
            there = [tuple(t.shape) for t in operands if on_gpu(t)]
            here = [tuple(t.shape) for t in on_host]
            raise DeviceError(
                f"{name}: expected all tensors on one device, got {there} on cuda:0 and {here} on "
                "the CPU"
            )


def _without_scalars(name: str, on_host: list[Tensor]) -> list[Tensor]:
    """Leave out the Python numbers of an op of ours, which travel as one host tensor (scalars.py).

    They are fp64; the tensors of the ops are fp32 or less.
    """
    if not name.startswith("fastrlhf::"):
        return on_host
    return [t for t in on_host if t.dtype != torch.float64]


# ---- start ---------------------------------------------------------------------------------------


def varlen_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """Compute torch.nn.attention.varlen's varlen_attn per sequence, causal from the last key."""
    assert (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and k.shape == v.shape
        and q.shape[1] == k.shape[1]
    )
    assert cu_q.dtype == cu_k.dtype == torch.int32 and window_size[1] == 0
    out = []
    # A kernel reads the lengths on the device, so reading them here is not a wait.
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        pairs = [itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k)]
    for (q0, q1), (k0, k1) in zip(*pairs, strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).tril(
            k1 - k0 - (q1 - q0)
        )
        if window_size[0] >= 0:
            visible = visible.triu(k1 - k0 - (q1 - q0) - window_size[0])
        heads_first = [x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        done = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=visible)
        out.append(done[0].transpose(0, 1))
    return torch.cat(out)


class _Nothing(mock.MagicMock):
    """A stream or an event; there is one queue, and it is always empty."""


def _replace_cuda() -> None:
    generator = torch.default_generator  # the operators use it
    nothing = _Nothing()
    sizes = {"total_memory": 80 << 30, "multi_processor_count": 132}
    properties = types.SimpleNamespace(name="stand-in", major=9, minor=0, **sizes)
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: _wait(),
        "current_stream": lambda *_: nothing,
        "stream": lambda *_: contextlib.nullcontext(),
        "Stream": _Nothing,
        "Event": _Nothing,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (60 << 30, 80 << 30),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 30,
        "reset_peak_memory_stats": lambda *_: None,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_, **__: generator.get_state(),
        "set_rng_state": lambda state, *_, **__: generator.set_state(state),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "default_generators": (generator,),
        "nvtx": nothing,
    }
    for module in (torch.cuda, torch.cuda.random):
        for name, replacement in replacements.items():
            if hasattr(module, name):
                setattr(module, name, replacement)


def _replace_nccl() -> None:
    """Use gloo for communication, but require NCCL and its device for objects."""
    join, new_group = c10d.init_process_group, c10d.new_group

    def init_process_group(backend: str, **options: Any) -> None:
        if backend != "nccl":
            raise DeviceError(f"init_process_group({backend!r}): expected nccl on GPUs")
        join("gloo", **options)

    def group_of(*args: Any, backend: Any = None, pg_options: Any = None, **options: Any) -> Any:
        return new_group(*args, backend="gloo", **options)

    for module in (c10d, dist):
        module.init_process_group = init_process_group  # type: ignore[attr-defined]
        module.new_group = group_of  # type: ignore[attr-defined]
    c10d._get_object_coll_device = lambda *_: CUDA  # type: ignore[assignment, return-value]


def _follow_default_device() -> None:
    """Pass the device of `with torch.device("cuda")` to the modes outside of it."""
    context = torch.utils._device.DeviceContext
    plain = context.__torch_function__

    def function(self: Any, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if self.device.type != "cuda":
            return plain(self, func, types, args, kwargs)
        if (
            func in torch.utils._device._device_constructors()
            and (kwargs or {}).get("device") is None
        ):
            kwargs = {**(kwargs or {}), "device": self.device}
        return func(*args, **(kwargs or {}))

    context.__torch_function__ = function  # type: ignore[method-assign]


def _follow_ops() -> None:
    """Run implementations of this project's ops under modes of their own.

    They run outside of their caller's modes.
    """
    from fastrlhf.ops import registry

    plain = registry.custom_op

    def custom_op(name: str, mutates: str = "") -> Any:
        def register(implementation: Any) -> Any:
            @functools.wraps(implementation)  # its annotations are the schema
            def watched(*args: Any) -> Any:
                with Calls(), Operators():
                    return implementation(*args)

            return plain(name, mutates)(watched)

        return register

    registry.custom_op = custom_op


def start() -> None:
    """Simulate a GPU for the rest of the process; call it before the project's ops are imported."""
    assert not torch.cuda.is_available() and "fastrlhf.ops.logprob" not in sys.modules
    os.environ["FASTRLHF_BACKEND"] = "torch"
    _replace_cuda()
    _replace_nccl()
    _follow_default_device()
    _follow_ops()
    Calls().__enter__()
    Operators().__enter__()
    from torch.nn.attention import varlen

    from fastrlhf.models import eager_forward

    varlen.varlen_attn = varlen_attn
    # The real one would disable the handling of device properties.
    eager_forward.no_torch_function = contextlib.nullcontext
