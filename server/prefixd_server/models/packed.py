"""Makes the frozen LM's own modules faster on the CPU: the same functions, laid out for their use.

Weights never change here, so each matrix is laid out once for its product (``F.linear`` does that
in every call), and linear layers that read one input become one product. The product is ours on
CPUs with AVX2, else oneDNN's. RMS norms go to a kernel of ours where that gives what the module
gives; nothing is assumed from a family's name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefixd_server.models import rotary
from prefixd_server.native import kernels
from prefixd_server.native.gemm import Gemm, PackedWeight
from prefixd_server.native.kernels import Kernels

__all__ = ["FrozenLayer", "MakeLinear", "PackedLinear", "can_pack", "fast_gemm", "pack"]
__all__ += ["packed_linear", "packed_linears"]

log = logging.getLogger(__name__)

_ROWS = 128
"""Rows of input that oneDNN lays weights out for. Its layouts for 1 or 32 rows are slow, or made
anew in each call, at other sizes; this one served 1 to 256 rows within a tenth of the best, with
AVX-512 and with AVX2 alike."""
_LEAST_SIZE = 16
"""smaller matrices gain nothing, and oneDNN has no layout for some"""


MakeLinear = Callable[[Tensor, Tensor | None], nn.Module]
"""of a weight [out, in] and a bias [out]"""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def pack(
    module: nn.Module,
    run: Callable[[], object] | None = None,
    linear: MakeLinear | None = None,
) -> None:
    """Replace linear layers, norms, activations and rotary embeddings below ``module`` in place.

    ``run`` runs the module once; what it shows to read one input is joined. The replaced layers
    hold no ``weight`` to train or to save. ``linear`` makes the layers that take their places.

    What is kept is copied. One tensor of a file, as a norm's, would keep all of it mapped: memory
    of no use, and a crash should the file be cut short.
    """
    linear = linear or packed_linear
    joined = _joined(module, run) if run is not None else []
    for parent, names in joined:
        layers = [getattr(parent, name) for name in names]
        source = _JoinedLinear(layers, linear)
        for index, name in enumerate(names):
            setattr(parent, name, _Part(source, index, layers[index]))
    loaded = kernels.load()
    # Only names: a list of the layers would keep all their weights to the end.
    for parent, name in [(parent, name) for parent, name, _ in _children(module)]:
        child = getattr(parent, name)
        if _is_linear(child):
            setattr(parent, name, linear(*_weight_and_bias(child)))
        elif loaded is not None and (norm := RMSNorm.like(child, loaded)) is not None:
            setattr(parent, name, norm)
        elif loaded is not None and (activation := Activation.like(child, loaded)) is not None:
            setattr(parent, name, activation)
    if loaded is not None:
        rotary.use_kernel(module, loaded)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def packed_linears(module: nn.Module) -> Iterator[nn.Module]:
    """The joined layers, which are not among ``module.modules()``."""
    sources = {id(m._source): m._source for m in module.modules() if isinstance(m, _Part)}
    for source in sources.values():
        yield source.linear


def _children(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _is_linear(module: nn.Module) -> bool:
    # Not subclasses: they may compute something else.
    return type(module) in (nn.Linear, Conv1D) and min(module.weight.shape) >= _LEAST_SIZE  # type: ignore[arg-type]


def _weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | None]:
    """weight [out, in]"""
    weight: Tensor = linear.weight.detach()
    bias = linear.bias.detach().clone() if linear.bias is not None else None
    return (weight.t() if isinstance(linear, Conv1D) else weight), bias


class FrozenLayer(nn.Module):
    """A layer whose weight is out of sight; some families look at its dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)

    def __call__(self, x: Tensor) -> Tensor:
        # Called some hundred times a step; torch's own __call__ is for hooks, which few have.
        if self._forward_pre_hooks or self._forward_hooks:
            result: Tensor = super().__call__(x)
            return result
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def fast_gemm() -> Gemm | None:
    """Our own products, where they are faster than oneDNN's."""
    loaded = kernels.load()
    return None if loaded is None or loaded.gemm.isa == "generic" else loaded.gemm


def packed_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    gemm = fast_gemm()
    if gemm is None:
        return _OneDNNLinear(weight, bias)
    return PackedLinear(gemm, gemm.pack(weight.contiguous()), bias)


class PackedLinear(FrozenLayer):
    def __init__(self, gemm: Gemm, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__(torch.float32)
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.packed = weight
        self.bias = bias if bias is None else bias.contiguous()
        self._linear = gemm.linear

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, self.packed, self.bias)


class _OneDNNLinear(FrozenLayer):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.dtype)
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return result


class _JoinedLinear:
    """Linear layers of one input as one product. The first one called computes for all."""

    def __init__(self, layers: list[nn.Module], linear: MakeLinear) -> None:
        weights, biases = zip(*map(_weight_and_bias, layers), strict=True)
        self._sizes = [len(weight) for weight in weights]
        bias = None
        if any(b is not None for b in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in pairs])
        self.linear = linear(torch.cat(weights), bias)
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        if x is not self._input:
            self._input = x
            self._outputs = torch.split_with_sizes(self.linear(x), self._sizes, -1)
        output = self._outputs[index]
        if index == len(self._sizes) - 1:
            self._input, self._outputs = None, ()
        return output


class _Part(FrozenLayer):
    def __init__(self, source: _JoinedLinear, index: int, like: nn.Module) -> None:
        weight, _ = _weight_and_bias(like)
        super().__init__(weight.dtype)
        self.out_features, self.in_features = weight.shape
        self._source = source
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        return self._source.part(x, self._index)


def _joined(
    module: nn.Module, run: Callable[[], object]
) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Siblings that are called one after another with the very same tensor, by watching a run."""
    calls: list[tuple[nn.Module, str, Tensor]] = []
    hooks = []
    for parent, name, child in _children(module):
        if _is_linear(child):
            note = _noting(calls, parent, name)
            hooks.append(child.register_forward_pre_hook(note))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[tuple[nn.Module, list[str], Tensor]] = []
    for parent, name, x in calls:
        if groups and groups[-1][0] is parent and groups[-1][2] is x:
            groups[-1][1].append(name)
        else:
            groups.append((parent, [name], x))
    return _found_once(groups)


def _found_once(
    groups: list[tuple[nn.Module, list[str], Tensor]],
) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Groups of several layers; none that is also called in another way (a shared layer is)."""
    seen: dict[tuple[int, str], int] = {}
    for parent, names, _ in groups:
        for name in names:
            seen[id(parent), name] = seen.get((id(parent), name), 0) + 1
    return [
        (parent, tuple(names))
        for parent, names, _ in groups
        if len(names) > 1 and all(seen[id(parent), name] == 1 for name in names)
    ]


def _noting(
    calls: list[tuple[nn.Module, str, Tensor]], parent: nn.Module, name: str
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append((parent, name, args[0]))

    return note


class RMSNorm(FrozenLayer):
    def __init__(self, kernels: Kernels, weight: Tensor, plus: float, epsilon: float) -> None:
        super().__init__(weight.dtype)
        self._kernels = kernels
        self.scale = weight
        self.plus = plus
        self.epsilon = epsilon

    @classmethod
    def like(cls, module: nn.Module, kernels: Kernels) -> RMSNorm | None:
        """The kernel's norm with the module's weight, if it computes what the module computes."""
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
            return None
        weight = weight.detach().clone()
        x = torch.randn(3, 5, len(weight), generator=torch.Generator().manual_seed(0))
        # Small rows show where epsilon goes.
        x *= torch.tensor([3.0, 0.1, 1e-3]).view(3, 1, 1)
        try:
            expected = module(x)
        except Exception:
            return None
        for plus in (0.0, 1.0):
            norm = cls(kernels, weight, plus, epsilon)
            if torch.allclose(norm(x), expected, rtol=1e-5, atol=1e-6):
                return norm
        return None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.stride(1) < x.stride(2):
            # Heads ahead of tokens: the rows are the same, and the result lies as the input does.
            return self(x.transpose(1, 2)).transpose(1, 2)
        return self._kernels.rms_norm(x.contiguous(), self.scale, self.plus, self.epsilon)


class Activation(nn.Module):
    """SiLU, or GELU by its tanh formula, which families write in up to eight operators."""

    _SHAPES = ((1.0, 0.0), (math.sqrt(8 / math.pi), 0.044715))
    """slope and cubic term of ``x * sigmoid(slope * (x + cubic * x**3))``"""

    def __init__(self, kernels: Kernels, original: nn.Module, slope: float, cubic: float) -> None:
        super().__init__()
        self._kernels = kernels
        self._original = original
        self.slope = slope
        self.cubic = cubic

    @classmethod
    def like(cls, module: nn.Module, kernels: Kernels) -> Activation | None:
        """The kernel's function, if it computes what a module without state computes."""
        if "LU" not in type(module).__name__ or any(True for _ in module.parameters()):
            return None
        x = torch.linspace(-12, 12, 4 * 50).view(4, 50)
        try:
            expected = module(x)
        except Exception:
            return None
        for slope, cubic in cls._SHAPES:
            activation = cls(kernels, module, slope, cubic)
            if torch.allclose(activation(x), expected, rtol=1e-5, atol=1e-6):
                return activation
        return None

    def forward(self, x: Tensor) -> Tensor:
        if x.stride(-1) == 1 and (x.is_contiguous() or _is_one_list_of_rows(x)):
            return self._kernels.activate(x, self.slope, self.cubic)
        result: Tensor = self._original(x)
        return result


def _is_one_list_of_rows(x: Tensor) -> bool:
    """Whether all but the last two dimensions are 1."""
    return x.dim() >= 2 and x.numel() == x.shape[-1] * x.shape[-2]
