"""Links: which quantizer produced the input of each QAT module, found by recording a forward.

A tensor that a quantizer puts out is followed through operators that keep its grid (`graph.scale_preserving`).
Producers that meet at one input — branches of Python control flow, pyramid levels, the inputs of a concat — become one
shared quantizer, because hardware has one `s_in` there: see `qbench.grouping`. An input that no quantizer produced gets
a quantizer at its consumer. Modules that quantize their weight only take any input as it comes and put out float: they
have no links. Calls are counted, so that an observer knows how many tensors a forward shows it.

Three traps: a tensor must be kept alive by the key that stands for it (ids are reused), so keys are weak tensor
references; a tag is void when the tensor was written to since (`_version`), or writes through a view would give wrong
links; so recording needs version counters and runs under no_grad, not inference_mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from qbench.errors import LinkError
from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.switches import switched_off
from qbench.graph.scale_preserving import is_scale_joining, is_scale_preserving
from qbench.grouping import FloatSource, Groups, Place, Producer, group, shares, total_uses
from qbench.modes import evaluating, modes_kept
from qbench.nn.qat.body import QatModule
from qbench.qconfig import QuantizerConfig
from qbench.report.preparation import FloatInput, FloatOperation, RequantizedInput, SharedQuantizer

aten = torch.ops.aten


@dataclasses.dataclass
class Links:
    """What a recording found, in order of first sight.

    Attributes:
        seen: The producers at each input of each module.
        float_operations: Operators outside QAT modules that compute on real values, with the modules that these come
            from: none where they come from the model's inputs alone.
        uses: The most calls of each place that one forward made.
    """

    seen: dict[QatModule, dict[int, dict[Producer, None]]] = dataclasses.field(default_factory=dict)
    float_operations: dict[tuple[str, tuple[str, ...]], None] = dataclasses.field(default_factory=dict)
    uses: Counter[Place] = dataclasses.field(default_factory=Counter)

    def add(self, module: QatModule, index: int, producer: Producer) -> None:
        """Note one producer at one input."""
        self.seen.setdefault(module, {}).setdefault(index, {})[producer] = None


@torch.inference_mode(False)
def link(model: nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> LinkResult:
    """Record forwards of a prepared model and connect every QAT module to the quantizers of its inputs, in place.

    Args:
        model: A prepared model.
        calls: Positional and keyword arguments of each forward to record; together they must reach every branch.

    Returns:
        What was quantized at a consumer, what was merged, what was not reached.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, QatModule)}
    links = Links()
    calls = torch.utils._pytree.tree_map_only(Tensor, _with_version, calls)
    with _quiet(model, modules.values()):
        for args, kwargs in calls:
            _record(model, modules.values(), links, args, kwargs)
        missing = [module for module in modules.values() if module not in links.seen and _has_links(module)]
        if missing:
            # Auxiliary heads run in training only: show containers training mode, but no BatchNorm and no dropout. What
            # was reached before is not looked at again: functional dropout is no part of what is deployed.
            late = Links()
            with _containers_in_training(model):
                for args, kwargs in calls:
                    _record(model, modules.values(), late, args, kwargs)
            links.seen.update({module: late.seen[module] for module in missing if module in late.seen})
            links.uses |= late.uses
    return _connect(model, modules, links)


@dataclasses.dataclass(frozen=True)
class LinkResult:
    """What `link` did, for the preparation report."""

    float_inputs: tuple[FloatInput, ...]
    float_operations: tuple[FloatOperation, ...]
    shared: tuple[SharedQuantizer, ...]
    unreached: tuple[str, ...]
    requantized: tuple[RequantizedInput, ...]


class _Recorder(TorchDispatchMode):
    """Follows producers through dispatched operators."""

    def __init__(self, links: Links, quantizes: bool) -> None:
        super().__init__()
        self.quantizes = quantizes  # whether any activation has a grid
        self.tags: Any = WeakTensorKeyDictionary()
        self.links = links
        self.depth = 0  # of QAT modules that are running: what they compute is theirs
        self.written: list[tuple[Tensor, Producer]] = []
        self.real: Any = WeakTensorKeyDictionary()  # tensors that were computed from the model's inputs

    def enter(self, inputs: Any) -> None:
        """Note the inputs of the model."""
        for tensor in torch.utils._pytree.tree_leaves(inputs):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.real[tensor] = True

    def tag(self, tensor: Tensor, producer: Producer) -> None:
        self.settle()
        self.tags[tensor] = (producer, tensor._version)

    def settle(self) -> None:
        """Tag the last operator's results: one that writes moves the version, a view takes over that of its base.

        Both happen after the operator's dispatch.
        """
        for tensor, producer in self.written:
            self.tags[tensor] = (producer, tensor._version)
        self.written.clear()

    def producer(self, tensor: Tensor) -> Producer | None:
        self.settle()
        producer, version = self.tags.get(tensor, (None, None))
        return producer if version == tensor._version else None

    def producer_or_source(self, tensor: Tensor, source: FloatSource) -> Producer:
        found = self.producer(tensor)
        if found is None:
            found = source
            self.tag(tensor, found)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.settle()
        tag = self._output_tag(func, args, kwargs)  # before the call: an in-place operator changes the version
        real = any(tensor in self.real for tensor in _tensors(args, kwargs))
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if real:
                self.real[tensor] = True
            if tag is not None:
                self.tag(tensor, tag)
                self.written.append((tensor, tag))  # after tag, which settles
        return out

    def _output_tag(self, func: Any, args: Any, kwargs: Any) -> Producer | None:
        if is_scale_preserving(func, args, kwargs):
            return self.producer(args[0]) if args and isinstance(args[0], Tensor) else None
        if is_scale_joining(func):
            found = {self.producer(tensor) for tensor in args[0]}
            if len(found) == 1:
                return next(iter(found))
        tensors = _tensors(args, kwargs)
        producers = [producer for producer in map(self.producer, tensors) if producer is not None]
        if not self.depth and func._overloadpacket not in _WITHOUT_VALUES:
            real = any(tensor in self.real for tensor in tensors)
            self._note_float_operation(func, producers, real)
        if not producers:
            return None
        by_design = all(isinstance(producer, FloatSource) and producer.by_design for producer in producers)
        return FloatSource("operator", str(func._overloadpacket), _reads(producers), by_design)

    def _note_float_operation(self, func: Any, producers: list[Producer], real: bool) -> None:
        if any(isinstance(producer, FakeQuantize) or not producer.by_design for producer in producers) or (
            real and not producers and self.quantizes
        ):
            self.links.float_operations[str(func._overloadpacket), _reads(producers)] = None


def _reads(producers: Sequence[Producer]) -> tuple[str, ...]:
    """Paths of the QAT modules that values come from."""
    paths: dict[str, None] = {}
    for producer in producers:
        owner = (producer.label.rpartition(".")[0],) if isinstance(producer, FakeQuantize) else producer.reads
        paths.update(dict.fromkeys(owner))
    return tuple(paths)


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


# They read the shape and the dtype of a tensor, not its values.
_WITHOUT_VALUES = frozenset(
    {
        *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like),
        *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full),
    }
)


def _record(
    model: nn.Module, modules: Any, links: Links, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    recorder = _Recorder(links, any(map(_has_links, modules)))
    tensors = (*model.named_parameters(), *model.named_buffers())
    stored = {id(tensor): name for name, tensor in tensors}
    uses: Counter[Place] = Counter()

    def count(quantizer: Any, inputs: tuple[Any, ...]) -> None:
        uses[quantizer] += 1

    def before(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        recorder.depth += 1
        if not _has_links(module):
            return
        links.seen.setdefault(module, {})
        for index, tensor in enumerate(module.data_tensors((*inputs, *named.values()))):
            name = stored.get(id(tensor))
            source = FloatSource("stored", name) if name else FloatSource("input")
            links.add(module, index, recorder.producer_or_source(tensor, source))
            uses[module, index] += 1

    def leave(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        recorder.depth -= 1
        if not _has_links(module):
            recorder.tag(output, FloatSource("weight_only", type(module).__name__, by_design=True))

    def after(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        recorder.tag(output, module)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, prepend=True).remove)
            if module.output_quantizer is not None:
                stack.callback(module.output_quantizer.register_forward_hook(after).remove)
        for quantizer in (m for m in model.modules() if isinstance(m, FakeQuantize)):
            stack.callback(quantizer.register_forward_pre_hook(count).remove)
        recorder.enter((args, kwargs))
        stack.enter_context(recorder)
        model(*args, **kwargs)
    links.uses |= uses  # the larger count of each


def _has_links(module: QatModule) -> bool:
    """Whether a module's activations are quantized."""
    return module.output_quantizer is not None


@contextlib.contextmanager
def _quiet(model: nn.Module, modules: Any) -> Iterator[None]:
    """Eval, no gradients, quantizers passing values through, no compiled code, the random state as it was."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(switched_off(q for q in model.modules() if isinstance(q, FakeQuantize)))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            stack.enter_context(module.recording())
        yield


@contextlib.contextmanager
def _containers_in_training(model: nn.Module) -> Iterator[None]:
    own = (QatModule, FakeQuantize)  # a quantizer in training mode would observe
    containers = [m for m in model.modules() if any(True for _ in m.children()) and not isinstance(m, own)]
    with modes_kept(containers):
        for module in containers:
            module.training = True
        yield


def _connect(model: nn.Module, modules: dict[str, QatModule], links: Links) -> LinkResult:
    names = {module: name for name, module in modules.items()}
    groups = group(names, links.seen)
    members: dict[Producer, list[FakeQuantize]] = {}
    for producer in list(groups.parent):
        if isinstance(producer, FakeQuantize):
            members.setdefault(groups.find(producer), []).append(producer)
    quantizers: dict[Producer, FakeQuantize] = {}
    float_inputs, requantized = [], []
    for module, inputs in links.seen.items():
        sources, owned, again = [], [], []
        for index in sorted(inputs):
            producers = list(inputs[index])
            if (module, index) in groups.requantized:
                sources.append(_again(module, groups))
                again.append(index)
                requantized.append(RequantizedInput(names[module], index, _reads(producers)))
                continue
            root = groups.find(producers[0])
            if root not in quantizers:
                quantizers[root] = root if isinstance(root, FakeQuantize) else _like(module, root.origin == "stored")
            sources.append(quantizers[root])
            lost = [producer for producer in producers if isinstance(producer, FloatSource)]
            if lost:
                owned.append(index)
                float_inputs.append(FloatInput(names[module], index, lost[0].origin, lost[0].name))
        module.connect(tuple(sources), tuple(owned), tuple(again))
    shared = _merge(modules, groups, members)
    for quantizer, uses in total_uses(links.uses, groups).items():
        quantizer.observer.expect(uses)
    label_quantizers(model)
    unreached = tuple(name for name, module in modules.items() if module not in links.seen and _has_links(module))
    return LinkResult(tuple(float_inputs), tuple(_float_operations(links)), shared, unreached, tuple(requantized))


def _float_operations(links: Links) -> Iterator[FloatOperation]:
    for operator, reads in links.float_operations:
        kind = operator.removeprefix("aten.").rstrip("_")
        yield FloatOperation(operator, reads, f"qbench.nn.{_AS_MODULES[kind]}()" if kind in _AS_MODULES else "")


# Operators of which there is a module that owns a quantizer; `fuse` puts it in place where it can trace.
_AS_MODULES = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "cat": "Cat", "stack": "Stack"},
    **{"mm": "MatMul", "bmm": "MatMul", "matmul": "MatMul", "clamp": "Clamp"},
}


def _with_version(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode and has no version counter."""
    return tensor.clone() if tensor.is_inference() else tensor


def _again(module: QatModule, groups: Groups) -> FakeQuantize:
    """What puts an input that has a grid on another one: that of a shared op's output, else one of its own."""
    root = groups.find(module.output_quantizer) if shares(module) and module.output_quantizer is not None else None
    return root if isinstance(root, FakeQuantize) else _like(module)


def _like(module: QatModule, is_stored: bool = False) -> FakeQuantize:
    """A quantizer for an input of a module; one that is stored in the model is an operand with a grid of its own."""
    own, qconfig = module.output_quantizer, module.qconfig
    assert own is not None  # only modules with links ask for one
    if is_stored and module.symmetric_parameters and isinstance(qconfig.activation, QuantizerConfig):
        spec = dataclasses.replace(qconfig.activation.spec, symmetric=True)
        quantizer = dataclasses.replace(qconfig.activation, spec=spec).make()
    else:
        quantizer = qconfig.make_input()
    quantizer.train(module.training)
    quantizer.observer_enabled, quantizer.fake_quant_enabled = own.observer_enabled, own.fake_quant_enabled
    return quantizer.to(next((b.device for b in own.buffers()), "cpu"))


def _merge(
    modules: dict[str, QatModule], groups: Groups, members: dict[Producer, list[FakeQuantize]]
) -> tuple[SharedQuantizer, ...]:
    shared = []
    for root, quantizers in members.items():
        if len(quantizers) < 2 or not isinstance(root, FakeQuantize):
            continue
        owners = [(name, m) for name, m in modules.items() if any(m.output_quantizer is q for q in quantizers)]
        specs = {
            f"{type(q).__name__} of {q.spec}": name for name, m in owners for q in [m.output_quantizer] if q is not None
        }
        if len(specs) > 1:
            listed = "; ".join(f"{name} has {spec}" for spec, name in specs.items())
            raise LinkError(
                f"quantizers must become one because {groups.reasons.get(root, 'they meet')}, but they differ: "
                f"{listed}. Give these modules the same qconfig"
            )
        for _, module in owners:
            module.output_quantizer = root
        shared.append(SharedQuantizer(tuple(name for name, _ in owners), groups.reasons.get(root, "they meet")))
    return tuple(shared)


def label_quantizers(model: nn.Module) -> None:
    """Tell every quantizer its path, for messages."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            module.label = name


def only_once(hook: Any, module: nn.Module) -> None:
    """Remove a forward pre-hook of a module by its identity: handles do not survive deepcopy, hooks do."""
    for key in [key for key, known in module._forward_pre_hooks.items() if known is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
