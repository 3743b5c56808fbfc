"""Register ops with torch: opaque nodes to torch.compile, with a shape function and a gradient.

An implementation takes its arguments in groups (NamedTuples such as VocabShard), and so do its
callers, its shape function and the set-up of its gradient; the schema that torch sees is flat.
Gradients are returned by the name of the argument.

This uses torch.library.Library because torch.library.custom_op imports torch._dynamo at the first
call (2 s, and packages that an install of torch alone need not have) and checks every call for
aliasing.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("fastrlhf", "FRAGMENT")
_SCHEMA_TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    int | None: "SymInt?",
    bool: "bool",
    list[bool]: "bool[]",
    str: "str",
}


class Context(Protocol):
    """The part of autograd's context that the ops use; each op's own context adds attributes."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class Function(Protocol):
    """A function whose signature is known at run time only."""

    def __call__(self, *arguments: object) -> object: ...


Arguments = ParamSpec("Arguments")
Upstream = ParamSpec("Upstream")
Some = ParamSpec("Some")  # a shape function names only the arguments that it uses
Result = TypeVar("Result")
Ctx = TypeVar("Ctx", bound=Context)
Gradients = Mapping[str, Tensor | None]


def flattened(groups: tuple[object, ...]) -> list[object]:
    """Return the arguments with each NamedTuple replaced by its fields."""
    flat: list[object] = []
    for group in groups:
        if isinstance(group, tuple):
            flat.extend(group)
        else:
            flat.append(group)
    return flat


class Op(Generic[Arguments, Result]):
    """An op of torch.ops.fastrlhf, called with the (grouped) arguments of its implementation."""

    def __init__(
        self, name: str, implementation: Callable[Arguments, Result], mutates: str
    ) -> None:
        hints = typing.get_type_hints(implementation)
        returned = hints.pop("return")
        self._groups = [_Group(name, hint) for name, hint in hints.items()]
        fields = [field for group in self._groups for field in group.fields]
        self._positions = {name: position for position, (name, _) in enumerate(fields)}
        assert len(self._positions) == len(fields), f"{name}: two arguments have one name"
        arguments = [
            f"{_SCHEMA_TYPES[hint]}{'(a!)' if name == mutates else ''} {name}"
            for name, hint in fields
        ]
        _LIBRARY.define(f"{name}({', '.join(arguments)}) -> {_returned(returned)}")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, self._grouping(cast(Function, implementation)), key)
        self.overload = getattr(torch.ops.fastrlhf, name).default
        self.name: str = self.overload.name()
        self.differentiable = False

    def __call__(self, *groups: Arguments.args, **named: Arguments.kwargs) -> Result:
        assert not named, "an op takes its arguments by position"
        arguments = flattened(groups)
        if self.differentiable and not torch.compiler.is_compiling():
            _refuse_transforms(self.name, arguments)
        return self.overload(*arguments)

    def _grouped(self, flat: tuple[object, ...]) -> list[object]:
        groups, start = [], 0
        for group in self._groups:
            stop = start + group.size
            groups.append(flat[start] if group.make is None else group.make(flat[start:stop]))
            start = stop
        return groups

    def _grouping(self, function: Function) -> Function:
        return lambda *flat: function(*self._grouped(flat))

    def needs_grad(self, ctx: Context, *names: str) -> list[bool]:
        """Return whether autograd wants the gradient of each argument named."""
        return [ctx.needs_input_grad[self._positions[name]] for name in names]

    def register_fake(self, shapes: Callable[Some, Result]) -> None:
        """Register a function that returns empty tensors with the outputs' shapes and dtypes."""
        function = self._grouping(cast(Function, shapes))
        torch.library.register_fake(self.name, function, lib=_LIBRARY)

    def register_autograd(
        self,
        backward: Callable[Concatenate[Ctx, Upstream], Gradients],
        setup_context: Callable[Concatenate[Ctx, Result, Arguments], None] | None = None,
    ) -> None:
        """Give the op its gradient, once differentiable.

        `setup_context(ctx, output, *arguments)` saves what `backward(ctx, *upstream)` needs;
        `backward` returns the gradients by argument name, those it leaves out being None.
        What is saved is a constant to autograd, so a second derivative (create_graph=True) would be
        silently wrong: it raises RuntimeError.
        """

        self.differentiable = True
        run = cast(Function, backward)

        def gradients_of(ctx: Context, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            by_position: list[Tensor | None] = [None] * len(self._positions)
            for name, gradient in cast(Gradients, run(ctx, *upstream)).items():
                by_position[self._positions[name]] = gradient
            return tuple(by_position)

        def once(ctx: Context, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return gradients_of(ctx, *upstream)
            with torch.no_grad():
                gradients = gradients_of(ctx, *upstream)
            # each requires grad, even from constant upstreams, so that no path past it counts as 0
            return tuple(
                None if g is None else _Once.apply(g.detach().requires_grad_(), self.name)
                for g in gradients
            )

        def setup(ctx: Context, inputs: tuple[object, ...], output: object) -> None:
            cast(Function, setup_context)(ctx, output, *self._grouped(inputs))

        torch.library.register_autograd(
            self.name, once, setup_context=setup_context and setup, lib=_LIBRARY
        )


def _refuse_transforms(name: str, arguments: list[object]) -> None:
    """Raise RuntimeError where a transform would lose the gradient of an argument in silence."""
    forward_mode = forward_ad._current_level >= 0
    inside_func = torch._C._functorch.peek_interpreter_stack() is not None
    if not forward_mode and not inside_func:
        return
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    if inside_func and any(map(_tracked_by_func, tensors)):
        raise RuntimeError(
            f"{name} has no derivative inside torch.func (grad, vjp, jvp): call"
            " torch.autograd.grad or .backward(), or its plain torch formula, the function"
            " of the op's name that ends in _ref"
        )
    if forward_mode and any(map(_has_tangent, tensors)):
        raise RuntimeError(
            f"{name} has no forward-mode derivative: use reverse mode (.backward(),"
            " torch.autograd.grad), or its plain torch formula, the function of the op's name"
            " that ends in _ref"
        )


def _has_tangent(x: Tensor) -> bool:
    level = forward_ad._current_level
    return level >= 0 and forward_ad.unpack_dual(x, level=level).tangent is not None


def _tracked_by_func(x: Tensor) -> bool:
    """Return whether torch.func differentiates with respect to x, perhaps below a vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and (x.requires_grad or _has_tangent(x)):
            return True
        x = functorch.get_unwrapped(x)
    return False


class _Group:
    """One parameter of an implementation: a value of the schema, or a NamedTuple of several."""

    def __init__(self, name: str, hint: type) -> None:
        self.make: Callable[[tuple[object, ...]], object] | None = None
        self.fields: list[tuple[str, type]] = [(name, hint)]
        if isinstance(hint, type) and issubclass(hint, tuple):
            self.make = getattr(hint, "_make")  # noqa: B009  (typed for NamedTuples only)
            self.fields = list(typing.get_type_hints(hint).items())
        self.size = len(self.fields)


def _returned(hint: type) -> str:
    if hint is type(None):
        return "()"
    if hint is Tensor:
        return "Tensor"
    types = typing.get_args(hint) or tuple(typing.get_type_hints(hint).values())
    return f"({', '.join(_SCHEMA_TYPES[each] for each in types)})"


def custom_op(
    name: str, mutates: str = ""
) -> Callable[[Callable[Arguments, Result]], Op[Arguments, Result]]:
    """Define fastrlhf::name with the decorated implementation for CPU and CUDA.

    The schema comes from its annotations. `mutates` names the one argument written in place.
    """
    return lambda implementation: Op(name, implementation, mutates)


class _Once(torch.autograd.Function):
    """The identity for gradients that have no derivative: differentiating through it raises."""

    @staticmethod
    def forward(ctx: _OnceContext, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: _OnceContext, *_: Tensor | None) -> None:
        raise RuntimeError(
            f"{ctx.name} has no second derivative: use its plain torch formula for gradient"
            " penalties"
        )


class _OnceContext(Context, Protocol):
    name: str
