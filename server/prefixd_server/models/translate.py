"""From what was seen of a model's step to the operations of a program.

A tensor is known by its storage, its place there and its strides: views cost nothing and need no
names. Each storage that is computed becomes a buffer with one row a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefixd_server.native.program import Buffer, Columns, Kind, Operation

__all__ = ["CannotTranslate", "Node", "translate"]


class CannotTranslate(Exception):
    """The model does something that programs do not know; says what."""


@dataclass(frozen=True, eq=False)
class Node:
    """One thing that was computed."""

    what: Kind | str
    """a kind of our own, or the name of torch's operator"""
    args: tuple[Any, ...]
    fields: dict[str, Any]
    """of our own operation, or the operator's keyword arguments"""
    result: Any

    @property
    def output(self) -> Tensor | None:
        first = self.result[0] if isinstance(self.result, tuple | list) else self.result
        return first if isinstance(first, Tensor) else None


def translate(
    nodes: Sequence[Node], inputs: dict[str, Tensor], logits: Tensor, *, tokens: int
) -> list[Operation]:
    """``inputs``: ``input_ids``, ``position_ids`` [1, T] and ``logits_to_keep`` [kept] of the step
    that gave ``logits`` [1, kept, V]; ``tokens`` is T. Raises CannotTranslate."""
    translation = _Translation(inputs, tokens)
    for node in _needed(nodes, inputs, logits):
        translation.add(node)
    operations = translation.operations
    if not operations or not operations[-1].output.is_whole:
        raise CannotTranslate("its logits are not the last thing that it computes")
    return _fuse(operations)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:
        raise CannotTranslate("its weights are packed by oneDNN") from None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _needed(nodes: Sequence[Node], inputs: dict[str, Tensor], logits: Tensor) -> list[Node]:
    """Those that the logits come from, in order. A storage is made by the last node that returned
    it without having been given it: our own layers are noted after the operators inside them."""
    makers: dict[int, int] = {}
    for index, node in enumerate(nodes):
        given = {_storage(tensor) for tensor in _tensors(node.args)}
        for tensor in _tensors(node.result):
            if _storage(tensor) not in given:
                makers[_storage(tensor)] = index
            elif not isinstance(node.what, Kind) and _mutates(node.what):
                raise CannotTranslate(f"it changes a tensor in place, by {node.what}")
    stops = {_storage(tensor) for tensor in inputs.values()}
    wanted: set[int] = set()
    queue = [_storage(logits)]
    while queue:
        storage = queue.pop()
        maker = makers.get(storage)
        if storage in stops or maker is None or maker in wanted:
            continue
        wanted.add(maker)
        queue += map(_storage, _tensors(nodes[maker].args))
    return [nodes[index] for index in sorted(wanted)]


def _mutates(operator: str) -> bool:
    return operator.split(".")[1].endswith("_")


class _Translation:
    def __init__(self, inputs: dict[str, Tensor], tokens: int) -> None:
        self.operations: list[Operation] = []
        self._inputs = {name: _storage(tensor) for name, tensor in inputs.items()}
        self._num_kept = inputs["logits_to_keep"].numel()
        self._tokens = tokens
        self._buffers: dict[int, Buffer] = {}

    def add(self, node: Node) -> None:
        output = node.output
        if output is None:
            raise CannotTranslate(f"{node.what} gives no tensor")
        if isinstance(node.what, Kind):
            self._add(node.what, node.args, output, **node.fields)
            return
        known = {
            "aten.add.Tensor": self._sum,
            "aten.mul.Tensor": self._product,
            "aten.div.Tensor": self._quotient,
            "aten.tanh.default": self._tanh,
            "aten.embedding.default": self._embedding,
            "aten.index.Tensor": self._kept_rows,
            "aten.native_layer_norm.default": self._layer_norm,
            "aten.clone.default": self._copy,
        }.get(node.what)
        if known is None:
            raise CannotTranslate(f"{node.what} is not known")
        known(node, output)

    def _sum(self, node: Node, output: Tensor) -> None:
        a, b = node.args
        if node.fields.get("alpha", 1) != 1 or not _same_shape(a, b):
            raise CannotTranslate("a sum of tensors of different shapes")
        self._add(Kind.ADD, (a, b), output)

    def _product(self, node: Node, output: Tensor) -> None:
        a, b = node.args
        if (factor := self._number(b)) is not None:
            self._add(Kind.SCALE, (a,), output, numbers=(factor, 0.0))
        elif _same_shape(a, b):
            self._add(Kind.MULTIPLY, (a, b), output)
        else:
            raise CannotTranslate("a product of tensors of different shapes")

    def _quotient(self, node: Node, output: Tensor) -> None:
        a, b = node.args
        divisor = self._number(b)
        if not divisor:
            raise CannotTranslate("a quotient of two tensors")
        self._add(Kind.SCALE, (a,), output, numbers=(1 / divisor, 0.0))

    def _tanh(self, node: Node, output: Tensor) -> None:
        self._add(Kind.TANH, node.args, output)

    def _number(self, value: Any) -> float | None:
        if isinstance(value, Tensor) and value.dim() == 0 and _storage(value) not in self._buffers:
            return float(value)
        return float(value) if isinstance(value, int | float) else None

    def _embedding(self, node: Node, output: Tensor) -> None:
        table, ids = node.args[:2]
        for name, of_position in (("input_ids", False), ("position_ids", True)):
            if _storage(ids) == self._inputs[name] and ids.numel() == self._tokens:
                self._add(Kind.EMBED, (), output, weight=_constant(table), flag=of_position)
                return
        raise CannotTranslate("an embedding of something else than tokens or positions")

    def _kept_rows(self, node: Node, output: Tensor) -> None:
        x, indices = node.args
        rows = [index for index in indices if index is not None]
        if len(rows) != 1 or _storage(rows[0]) != self._inputs["logits_to_keep"]:
            raise CannotTranslate("an index other than the rows to keep")
        self._add(Kind.KEEP, (x,), output, kept=True)

    def _layer_norm(self, node: Node, output: Tensor) -> None:
        x, shape, weight, bias, epsilon = node.args
        if len(shape) != 1 or weight is None:
            raise CannotTranslate("a layer norm without a weight, or over several dimensions")
        self._add(
            Kind.LAYER_NORM,
            (x,),
            output,
            weight=_constant(weight),
            bias=None if bias is None else _constant(bias),
            numbers=(0.0, epsilon),
        )

    def _copy(self, node: Node, output: Tensor) -> None:
        self._add(Kind.SCALE, (node.args[0],), output, numbers=(1.0, 0.0))

    def _add(
        self,
        kind: Kind,
        inputs: tuple[Tensor, ...],
        output: Tensor,
        *,
        kept: bool = False,
        **fields: Any,
    ) -> None:
        read = tuple(self._columns(tensor) for tensor in inputs)
        kept = kept or any(columns.buffer.kept for columns in read)
        rows = self._num_kept if kept else self._tokens
        if output.dtype != torch.float32 or output.numel() % rows:
            raise CannotTranslate(f"{kind.name} gives {tuple(output.shape)} of {output.dtype}")
        self._buffers[_storage(output)] = Buffer(output.numel() // rows, kept)
        written = self._columns(output)
        if not written.is_whole:
            raise CannotTranslate(f"{kind.name} gives a part of a tensor")
        self.operations.append(Operation(kind, read, written, **fields))

    def _columns(self, tensor: Tensor) -> Columns:
        """Which columns of which buffer a tensor is a view of."""
        buffer = self._buffers.get(_storage(tensor))
        if buffer is None:
            raise CannotTranslate("a tensor that comes from neither tokens nor layers")
        rows = self._num_kept if buffer.kept else self._tokens
        dims = [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
        if (rows, buffer.width) not in dims:
            raise CannotTranslate(f"a tensor {tuple(tensor.shape)} without a dimension of tokens")
        dims.remove((rows, buffer.width))
        size = tensor.shape[-1]
        dims.sort(key=lambda item: item[1])
        width = 1
        for n, step in dims:
            if step != width:
                raise CannotTranslate("columns that are not beside each other")
            width *= n
        offset = int(tensor.storage_offset())
        if offset + width > buffer.width or width % size:
            raise CannotTranslate("columns of more than one row")
        return Columns(buffer, offset, width // size, size)


def _same_shape(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape


def _constant(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise CannotTranslate(f"a weight of {tensor.dtype}")
    return tensor.detach()


def _fuse(operations: list[Operation]) -> list[Operation]:
    """A product with an activation becomes part of it; a sum with a linear layer's result becomes
    the layer's, which adds to what is there."""
    uses: dict[Buffer, int] = {}
    for op in operations:
        for buffer in op.reads:
            uses[buffer] = uses.get(buffer, 0) + 1
    fused: list[Operation] = []
    renamed: dict[Buffer, Buffer] = {}

    def current(columns: Columns) -> Columns:
        return replace(columns, buffer=renamed.get(columns.buffer, columns.buffer))

    for index, op in enumerate(operations):
        op = replace(op, inputs=tuple(map(current, op.inputs)))
        before = fused[-1] if fused else op
        last = before.output
        if fused and uses.get(last.buffer) == 1 and last in op.inputs:
            others = [columns for columns in op.inputs if columns != last]
            if len(others) == 1 and (op.kind, before.kind) == (Kind.MULTIPLY, Kind.ACTIVATE):
                fused[-1] = replace(before, inputs=(*before.inputs, *others), output=op.output)
                continue
            if (
                len(others) == 1
                and (op.kind, before.kind) == (Kind.ADD, Kind.LINEAR)
                and others[0].is_whole
                and not _read_after(operations[index + 1 :], others[0].buffer)
            ):
                fused[-1] = replace(before, output=others[0], flag=True)
                renamed[op.output.buffer] = others[0].buffer
                continue
        fused.append(op)
    return fused


def _read_after(operations: Sequence[Operation], buffer: Buffer) -> bool:
    return any(buffer in op.reads for op in operations)
