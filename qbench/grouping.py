"""Which quantizers become one: those that meet at one input, and those around an op that computes on one grid.

Hardware has one `s_in` at each input. A grid that is known before any data (of a probability, or one that the target
demands) cannot become another: where it meets others, the consumer puts its input on a grid of its own.

    meet at an input            one quantizer, or, with a known grid among them, a quantizer of the consumer's input
    around a shared op          one quantizer, and inputs with a known grid are put on it
    all on the same known grid  that one

One forward uses such a quantizer several times, as it does one of a module that is called again. What an observer is
told is the sum over all places, of each the most calls of one forward: branches of control flow count as well.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.body import QatModule
from qbench.report.preparation import FloatOrigin


@dataclasses.dataclass(frozen=True, eq=False)
class FloatSource:
    """A tensor on no grid: what made it, and the paths of the QAT modules that its values come from.

    One that is stored in the model, a parameter or a buffer, is an operand with a grid of its own. What follows layers
    that quantize their weight only is float by design, and no gap.
    """

    origin: FloatOrigin
    name: str = ""
    reads: tuple[str, ...] = ()
    by_design: bool = False


Producer = FakeQuantize | FloatSource
Seen = Mapping[QatModule, Mapping[int, Iterable[Producer]]]
#: Where a quantizer is called: a quantizer that exists, or the input, by module and position, that may get one.
Place = FakeQuantize | tuple[QatModule, int]


class Groups:
    """Union–find over producers.

    Attributes:
        reasons: Why a group became one, by the producer that represents it.
        requantized: Inputs that their consumer puts on a grid of its own, by module and position.
    """

    def __init__(self) -> None:
        self.parent: dict[Producer, Producer] = {}
        self.reasons: dict[Producer, str] = {}
        self.requantized: set[tuple[QatModule, int]] = set()

    def find(self, producer: Producer) -> Producer:
        """The one that represents it."""
        self.parent.setdefault(producer, producer)
        while self.parent[producer] is not producer:
            producer = self.parent[producer]
        return producer

    def join(self, producers: Iterable[Producer], reason: str) -> None:
        """Make one group of the groups of these."""
        roots = list(dict.fromkeys(self.find(producer) for producer in producers))
        # A quantizer that exists represents its group; one with a known grid, even more so.
        roots.sort(key=lambda root: (isinstance(root, FloatSource), known_grid(root) is None))
        for other in roots[1:]:
            self.parent[other] = roots[0]
            self.reasons[roots[0]] = reason

    def known(self, producer: Producer) -> tuple[float, int] | None:
        """Scale and zero point of its group, where they are known before any data."""
        return known_grid(self.find(producer))

    def is_alone(self, producer: Producer) -> bool:
        """Whether no other is in its group."""
        root = self.find(producer)
        return sum(self.find(other) is root for other in list(self.parent)) == 1


def known_grid(producer: Producer) -> tuple[float, int] | None:
    """Scale and zero point of a quantizer whose grid is known before any data."""
    return producer.known_grid if isinstance(producer, FakeQuantize) else None


def group(names: Mapping[QatModule, str], seen: Seen) -> Groups:
    """Group the producers that were seen at each input of each module.

    Args:
        names: Path of each module.
        seen: The producers, by module and position.
    """
    groups = Groups()
    for module, inputs in seen.items():
        for index, found in inputs.items():
            producers = list(found)
            if len({groups.known(producer) for producer in producers}) > 1:
                groups.requantized.add((module, index))
            else:
                groups.join(producers, f"they meet at input {index} of {names[module]}")
    for module, inputs in seen.items():
        if shares(module):
            _share(groups, module, names[module], {index: list(found) for index, found in inputs.items()})
    return groups


def total_uses(calls: Mapping[Place, int], groups: Groups) -> Counter[FakeQuantize]:
    """How many tensors a forward shows each quantizer.

    Args:
        calls: The most calls of each place that one forward made.
        groups: What became one; modules are connected already.
    """
    uses: Counter[FakeQuantize] = Counter()
    for place, count in calls.items():
        if isinstance(place, FakeQuantize):
            root = groups.find(place)
            uses[root if isinstance(root, FakeQuantize) else place] += count
            continue
        module, index = place
        if str(index) in module.input_quantizers:
            own = module.input_quantizers[str(index)]
            assert isinstance(own, FakeQuantize)  # `connect` was given nothing else
            uses[own] += count
    return uses


def shares(module: QatModule) -> bool:
    """Whether the target computes this module on one grid, inputs and output."""
    return module.output_quantizer is not None and (
        module.float_type.__name__ in module.qconfig.deployment.shared_ops
    )


def _is_alike(output: FakeQuantize, producers: Iterable[Producer]) -> bool:
    """Whether a quantizer can become one of these."""
    return all(isinstance(p, FakeQuantize) and (type(p), p.spec) == (type(output), output.spec) for p in producers)


def _share(groups: Groups, module: QatModule, name: str, inputs: Mapping[int, Sequence[Producer]]) -> None:
    output = module.output_quantizer
    assert output is not None  # `shares` says so
    everything = [producer for producers in inputs.values() for producer in producers]
    grids = {groups.known(producer) for producer in everything}
    # Nothing that such an op puts out lies outside of what goes in.
    if len(grids) == 1 and (None in grids or (groups.is_alone(output) and _is_alike(output, everything))):
        groups.join([*everything, output], f"{name} needs one grid on target {module.qconfig.deployment}")
        return
    for index, producers in inputs.items():
        if all(groups.known(producer) is None for producer in producers):
            groups.join([*producers, output], f"{name} needs one grid on target {module.qconfig.deployment}")
        else:
            groups.requantized.add((module, index))
