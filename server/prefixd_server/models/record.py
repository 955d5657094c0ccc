"""Makes a :class:`Program` of a decoder-only model by watching one packed step of it.

The model's own code runs once, on tensors: which of our packed layers it calls, what attention is
given, and every operator of torch's between them. Where all that reaches the logits is known, it
becomes a list of operations; nothing is assumed from a family's name, and the program must give the
logits that the model gives. Elsewhere the modules are called as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prefixd_server.attention.base import LayerOptions, SequenceSpan, StepPlan
from prefixd_server.attention.native import NativeBackend
from prefixd_server.kv.pool import KVPool
from prefixd_server.models.packed import Activation, PackedLinear, RMSNorm, packed_linears
from prefixd_server.models.translate import CannotTranslate, Node, translate
from prefixd_server.native import kernels
from prefixd_server.native.program import Kind, Program, Rotary
from prefixd_store.geometry import Geometry

__all__ = ["record"]

log = logging.getLogger(__name__)

_TOKENS = 13
"""of the step that is watched: a prime, so that no other dimension is mistaken for it"""
_KEPT = (3, 7, 12)
"""rows whose logits are asked for"""
_TOLERANCE = 1e-4
"""relative; sums of float32 in another order stay far below"""


def record(module: Any, geometry: Geometry) -> Program | None:
    """None, and a line in the log, where the model does something that programs do not know."""
    loaded = kernels.load()
    if loaded is None:
        return None
    try:
        recorder = _Recorder()
        logits = recorder.watch(module, loaded)
        operations = translate(recorder.nodes, recorder.inputs, logits, tokens=_TOKENS)
        program = Program(loaded, operations)
        _compare(module, program, geometry)
    except CannotTranslate as reason:
        log.info("%s runs by its own modules: %s", type(module).__name__, reason)
        return None
    return program


@torch.inference_mode()
def _compare(module: Any, program: Program, geometry: Geometry) -> None:
    """Two short sequences, then one more token of each; raises CannotTranslate."""
    page_size = 4
    backend = NativeBackend(
        KVPool(
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            num_pages=7,
            page_size=page_size,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    )
    pages = ([5, 1], [6, 2, 0])
    for lengths, contexts in (((5, 8), (0, 0)), ((1, 1), (5, 8))):
        tokens = [7 + i for i in range(sum(lengths))]
        positions = [c + i for n, c in zip(lengths, contexts, strict=True) for i in range(n)]
        keep = [len(tokens) - 1, lengths[0] - 1]
        plan = backend.plan(
            [SequenceSpan(*item) for item in zip(lengths, contexts, pages, strict=True)]
        )
        expected = module(
            input_ids=torch.tensor(tokens)[None],
            position_ids=torch.tensor(positions)[None],
            use_cache=False,
            logits_to_keep=torch.tensor(keep),
            attention_plan=plan,
        ).logits[0]
        pool = backend.pool
        pages_of = {"keys": pool.keys, "values": pool.values}
        given = program.run(tokens, positions, keep, slots=plan.slots, parts=plan.parts, **pages_of)
        error = ((given - expected).norm() / expected.norm()).item()
        if not error <= _TOLERANCE:
            raise CannotTranslate(f"its program gives other logits (relative error {error:.2g})")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is computed. All tensors are held, so that no address is used twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.inputs: dict[str, Tensor] = {}
        self._rotary: dict[int, Rotary] = {}

    @torch.no_grad()
    def watch(self, module: Any, loaded: kernels.Kernels) -> Tensor:
        """Run a step; the logits [1, kept, V]."""
        arguments = {
            "input_ids": torch.arange(1, _TOKENS + 1)[None],
            "position_ids": torch.arange(_TOKENS)[None],
            "logits_to_keep": torch.tensor(_KEPT),
        }
        self.inputs = arguments
        with ExitStack() as stack:
            for child in (*module.modules(), *packed_linears(module)):
                stack.enter_context(_hooked(child, self._after))
            stack.enter_context(_rotating_with(loaded, self._noting_rotate(loaded)))
            stack.enter_context(self)
            output = module(**arguments, use_cache=False, attention_plan=_NotingPlan(self))
        logits: Tensor = output.logits
        return logits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.nodes.append(Node(str(func), args, kwargs or {}, result))
        return result

    def note(self, kind: Kind, inputs: tuple[Tensor, ...], output: Tensor, **fields: Any) -> None:
        self.nodes.append(Node(kind, inputs, fields, output))

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, PackedLinear):
            packed = module.packed
            weight = {"weight": packed.data, "int8": packed.int8}
            self.note(Kind.LINEAR, args, output, bias=module.bias, **weight)
        elif isinstance(module, RMSNorm):
            numbers = (module.plus, module.epsilon)
            self.note(Kind.RMS_NORM, args, output, weight=module.scale, numbers=numbers)
        elif isinstance(module, Activation):
            numbers = (module.slope, module.cubic)
            self.note(Kind.ACTIVATE, args, output, numbers=numbers)
        elif "Rotary" in type(module).__name__ and isinstance(output, tuple):
            self._note_angles(module, args, kwargs, output)

    def _note_angles(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> None:
        given = self.inputs["position_ids"].data_ptr()

        def make(positions: Tensor) -> tuple[Tensor, Tensor]:
            def swap(value: Any) -> Any:
                # A family's own view of the positions is theirs too.
                same = isinstance(value, Tensor) and value.data_ptr() == given
                return positions if same else value

            values = {name: swap(value) for name, value in kwargs.items()}
            with torch.no_grad():
                cosine, sine = module(*map(swap, args), **values)
            return cosine, sine

        rotary = Rotary(make)
        for tensor in output:
            self._rotary[tensor.data_ptr()] = rotary

    def _noting_rotate(self, loaded: kernels.Kernels) -> Callable[..., Tensor]:
        original = loaded.rotate

        def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
            result = original(x, cosine, sine)
            rotary = self._rotary.get(cosine.data_ptr())
            if rotary is None or self._rotary.get(sine.data_ptr()) is not rotary:
                raise CannotTranslate("its rotary angles are not a module's")
            # [1, H, T, D] as the kernel leaves it: a view of [1, T, H, D]
            self.note(Kind.ROTATE, (x,), result, rotary=rotary)
            return result

        return rotate


class _NotingPlan(StepPlan):
    """What attention computes is of no account here: its output has the query's values."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        output = query.clone(memory_format=torch.contiguous_format)
        if options.relative_bias is not None:
            raise CannotTranslate("attention has a relative bias")
        self._recorder.note(
            Kind.ATTEND,
            (query, key, value),
            output,
            layer=layer,
            window=options.sliding_window or 0,
            numbers=(options.scaling, options.softcap or 0.0),
        )
        return output


@contextmanager
def _hooked(module: nn.Module, after: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _rotating_with(loaded: kernels.Kernels, rotate: Callable[..., Tensor]) -> Iterator[None]:
    loaded.rotate = rotate  # type: ignore[method-assign]
    try:
        yield
    finally:
        del loaded.rotate  # the class's own again
