"""Which quantizer of ours a node of MQBench's fx graph stands for.

MQBench traces the whole model and quantizes *inputs* of layers, so its quantizers follow nodes of the graph, and are
called `<node>_post_act_fake_quantizer`. A node is named by torch.fx: the path of a module with dots as underscores, the
name of a function, the name of an argument; the second node of a name gets `_1`. (ModelTC/MQBench:
mqbench/custom_quantizer/model_quantizer.py; names that it logs: its issues 58, 67 and 137.)

    features_0_0       a layer, or the first layer of a chain      its output quantizer
    features_0_2       the ReLU6 of a chain, a pool, a flatten     the quantizer that its input lies on
    layer1_0_relu_1    the second call of a ReLU: after the sum    the block's AddReLU
    add_3              the fourth sum of the model                 the fourth Add in the order of execution
    x                  an argument of the model                    the quantizer of its input, if there is one only
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

from torch import fx, nn

from qbench.nn import ops
from qbench.nn.qat.body import QatModule

# Classes of operations → how torch.fx names the function that they are.
_FUNCTIONS: dict[str, str] = {
    "Add": "add", "AddReLU": "add", "Sub": "sub", "Mul": "mul", "Cat": "cat", "Mean": "mean", "MatMul": "matmul",
}  # fmt: skip

# They hand their input's grid on.
_PASSING_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_PASSING_CALLS = (
    "flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "max_pool2d", "dropout",
    "relu", "relu_", "relu6", "getitem", "chunk", "split",
)  # fmt: skip

_REPEATED = re.compile(r"(?P<name>.+?)_(?P<count>\d+)")


@dataclasses.dataclass(frozen=True)
class Place:
    """Path of the QAT module whose output quantizer a node stands for.

    `direct` says that the node is what the module puts out; otherwise it hands on what that put out.
    """

    path: str
    direct: bool
    note: str = ""


class NodeNames:
    """Finds the place of a node name in one prepared model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.paths = {_node_name(path): path for path in self.modules if path}
        self.nodes = _trace(model)
        calls = [str(node.target) for node in self.nodes.values() if node.op == "call_module"]
        executed = [path for path in calls if isinstance(self.modules.get(path), QatModule)]
        self.order = executed or [path for path, module in self.modules.items() if isinstance(module, QatModule)]

    def place(self, name: str) -> Place | None:
        """Where a node's quantizer belongs; None where that cannot be told."""
        path = self.paths.get(name)
        if path is not None:
            return self._of_module(path)
        repeated = _REPEATED.fullmatch(name)
        base, count = (repeated["name"], int(repeated["count"])) if repeated else (name, 0)
        if repeated and base in self.paths:
            return self._of_repeated(self.paths[base])
        return self._of_function(base, count) or self._before(self.nodes.get(name))

    def _of_module(self, path: str) -> Place | None:
        if isinstance(self.modules[path], QatModule):
            return Place(path, direct=True)
        before = self._before(self.nodes.get(_node_name(path)))
        if before is not None or type(self.modules[path]) is not nn.Identity:
            return before
        # A part of a chain whose call is gone, as the forward became a graph: the wrapper is the nearest before it.
        parent = path.rpartition(".")[0]
        siblings = [p for p in self.modules if p.rpartition(".")[0] == parent]
        earlier = [p for p in siblings[: siblings.index(path)] if isinstance(self.modules[p], QatModule)]
        return Place(earlier[-1], direct=True, note="the last part of this chain") if earlier else None

    def _of_repeated(self, path: str) -> Place | None:
        if isinstance(self.modules[path], QatModule):
            return Place(path, direct=True, note="called more than once, with one quantizer")
        parent = path.rpartition(".")[0]
        sums = [p for p in self.order if p.rpartition(".")[0] == parent and isinstance(self.modules[p], ops.AddReLU)]
        return Place(sums[0], direct=True, note="the activation after this block's sum") if len(sums) == 1 else None

    def _of_function(self, base: str, count: int) -> Place | None:
        alike = [path for path in self.order if _FUNCTIONS.get(self._kind(path)) == base]
        return Place(alike[count], direct=True, note="by order of execution") if count < len(alike) else None

    def _kind(self, path: str) -> str:
        return str(self.modules[path].float_type.__name__)

    def _before(self, node: fx.Node | None) -> Place | None:
        """The module whose output reaches this node on its grid."""
        while node is not None and node.op != "placeholder":
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, QatModule):
                return Place(str(node.target), direct=False, note="hands on what it reads")
            called = getattr(node.target, "__name__", str(node.target)).rpartition(".")[2]
            passing = isinstance(module, _PASSING_MODULES) if module is not None else called in _PASSING_CALLS
            node = next(iter(node.all_input_nodes), None) if passing else None
        return None


class _WholeModel(fx.Tracer):
    """Traces into the user's modules, down to those of qbench and PyTorch."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Sequential, fx.GraphModule)):
            return False
        return isinstance(m, QatModule) or type(m).__module__.startswith(("torch.nn", "torch.ao"))


def _trace(model: nn.Module) -> dict[str, fx.Node]:
    """Nodes of the model by name; none where its control flow cannot be traced."""
    # A hook of prepare_qat waits for the first forward: it must not see a traced one.
    waiting = dict(model._forward_pre_hooks)
    graph: Any = None
    try:
        model._forward_pre_hooks.clear()
        # Whatever a user's forward raises on traced values: names of modules still tell.
        with contextlib.suppress(Exception):
            graph = _WholeModel().trace(model)
    finally:
        model._forward_pre_hooks.update(waiting)
    return {} if graph is None else {node.name: node for node in graph.nodes}


def _node_name(path: str) -> str:
    """The name that torch.fx gives the first call of a module."""
    name = re.sub("[^0-9a-zA-Z_]+", "_", path)
    return f"_{name}" if name[0].isdigit() else name
