"""From a float model to a QAT model in one call: fuse, one qconfig for each module, prepare.

Overrides name modules of the *float* model. Fusing keeps paths: a wrapper stands where its first part stood, so what
is said of the layer holds for the wrapper. Of the other parts only a width of activations can be told, by the last
one, whose output is the wrapper's; anything else that is said of them alone is reported as said in vain.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qbench import targets
from qbench.errors import ConfigError, QBenchWarning
from qbench.fusion import fuse
from qbench.nn.intrinsic import Fused
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.layer import QatLayer
from qbench.overrides import Override, exactly, overridden
from qbench.preparation import Examples, preparation_report, prepare_qat, quantized_modules, report_overrides
from qbench.qconfig import QConfig, get_qconfig
from qbench.report.preparation import AppliedOverride

_PATH = "_qbench_path"

# Field of an override -> (position of the override that said it, value).
_Asked = dict[str, tuple[int, Any]]


def prepare_by_target(
    model: nn.Module,
    target: str | targets.Target = "onnxruntime",
    *,
    example_inputs: Examples | None = None,
    overrides: Sequence[Override] = (),
    **options: Any,
) -> nn.Module:
    """Fuse a float model and prepare it for QAT with the rules of a target.

    Args:
        model: A float model; it is not changed. A `qconfig` that a module of it has holds there.
        target: Name of a target: `qbench.targets.names()`.
        example_inputs: As for `prepare_qat`.
        overrides: What holds for some modules only; later ones win.
        options: As for `get_qconfig`: weight_bits, activation_bits, bias_bits, …

    Returns:
        The prepared model; `preparation_report(model)` says which override hit which modules.

    Raises:
        ConfigError: the target does not have what is asked for, an override hits no module, or example_inputs are
            needed: to find the modules that another one reads, or the first and the last layer.
        PreparationError, FusionError, LinkError, NumericsError: as `fuse` and `prepare_qat`.
    """
    qconfig = get_qconfig(target, **options)
    for rule in overrides:
        if not isinstance(rule, Override):
            raise ConfigError(f"overrides: {rule!r} is not an Override; qbench.Override('layer1.*', weight_bits=4) is")
    fused = fuse(_with_paths(model))
    places = _Places(model, fused)
    for rule in overrides:
        places.check(rule)
    rules = (*_first_and_last(fused, qconfig, example_inputs), *overrides)
    asked = {place: places.asked(place, rules) for place in places.all}
    if any("input_bits" in fields for fields in asked.values()):
        _pass_to_producers(fused, qconfig, example_inputs, places, asked)
    _set_qconfigs(fused, qconfig, asked)
    prepared = prepare_qat(fused, inplace=True, qconfig=qconfig, example_inputs=example_inputs)
    report_overrides(prepared, tuple(places.applied(rule, prepared) for rule in rules))
    _warn_of_vain_overrides(prepared)
    return prepared


@dataclasses.dataclass(frozen=True, eq=False)
class _Place:
    """A module of the fused model.

    Attributes:
        module: The module; a wrapper's parts have no place of their own.
        paths: Where it is found.
        parts: Paths in the float model of the parts of a wrapper after the first; empty for a function.
    """

    module: nn.Module
    paths: tuple[str, ...]
    parts: tuple[str, ...] = ()


class _Places:
    """Every module that can have a qconfig, and which overrides name it."""

    def __init__(self, model: nn.Module, fused: nn.Module) -> None:
        self.kinds: dict[str, tuple[type[nn.Module], ...]] = {}
        found: dict[int, _Place] = {}
        for path, module in _outside_wrappers(fused):
            self.kinds[path] = (type(module),)
            before = found.get(id(module))
            paths = (*before.paths, path) if before is not None else (path,)
            parts = list(module)[1:] if isinstance(module, Fused) else []
            found[id(module)] = _Place(module, paths, tuple(part.__dict__.get(_PATH, "") for part in parts))
        for path, module in model.named_modules(remove_duplicate=False):
            self.kinds[path] = (type(module), *self.kinds.get(path, ()))
        self.all = tuple(found.values())
        for part in fused.modules():
            part.__dict__.pop(_PATH, None)

    def named(self, rule: Override, path: str) -> bool:
        """Whether an override names this module or one around it."""
        names = path.split(".") if path else []
        around = (".".join(names[:depth]) for depth in range(len(names) + 1))
        return any(rule.hits(place, self.kinds.get(place, ())) for place in around)

    def check(self, rule: Override) -> None:
        """Raise ConfigError if an override names nothing."""
        if any(rule.hits(path, kinds) for path, kinds in self.kinds.items()):
            return
        if isinstance(rule.match, str):
            paths = [path for path in self.kinds if path]
            near = difflib.get_close_matches(rule.match.strip("*."), paths, n=3, cutoff=0.3)
            hint = f"the nearest names are {', '.join(near)}" if near else f"names start with {', '.join(paths[:3])}"
            hint = f"; {hint}"
        else:
            known = sorted({kind.__name__ for kinds in self.kinds.values() for kind in kinds})
            hint = f"; the model has {', '.join(known)}"
        raise ConfigError(f"override {rule} hits no module{hint}")

    def asked(self, place: _Place, rules: Sequence[Override]) -> _Asked:
        """What all overrides together ask for one module."""
        result: _Asked = {}
        for order, rule in enumerate(rules):
            fields = rule.asked()
            if not any(self.named(rule, path) for path in place.paths):
                last = bool(place.parts) and self.named(rule, place.parts[-1])
                fields = {name: fields[name] for name in ("activation_bits",) if last and name in fields}
            result.update({name: (order, value) for name, value in fields.items()})
        return result

    def applied(self, rule: Override, prepared: nn.Module) -> AppliedOverride:
        """What an override hit, of the modules that were or could have been quantized."""
        report = preparation_report(prepared)
        able = {found.path for found in report.quantized} | {f.path for f in report.left_in_float if f.on_purpose}
        modules, vain = [], []
        for place in self.all:
            named = any(self.named(rule, path) for path in place.paths)
            parts = [part for part in place.parts if part and self.named(rule, part)]
            useful = "activation_bits" in rule.asked() and place.parts[-1:] == tuple(parts[-1:]) != ()
            if named or useful:
                modules += [path for path in place.paths if path in able]
            if not named:
                vain += [(part, place.paths[0]) for part in parts if not (useful and part == parts[-1])]
        return AppliedOverride(str(rule), tuple(modules), tuple(vain))


def _with_paths(model: nn.Module) -> nn.Module:
    """A copy whose modules know their path: fusing moves parts of chains into wrappers."""
    marked = copy.deepcopy(model)
    for path, module in marked.named_modules():
        module.__dict__[_PATH] = path
    return marked


def _outside_wrappers(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield path, model
    for name, child in () if isinstance(model, Fused) else model._modules.items():
        if child is not None:
            yield from _outside_wrappers(child, f"{path}.{name}" if path else name)


def _set_qconfigs(fused: nn.Module, qconfig: QConfig, asked: dict[_Place, _Asked]) -> None:
    held = {place: _held_qconfig(fused, place.paths[0], qconfig) for place in asked}
    for place, fields in asked.items():
        base = held[place]
        if base is None and fields.get("exclude", (0, None))[1] is False:
            base = qconfig  # it was left in float, and is taken back
        if fields and base is not None:
            values = {name: value for name, (_, value) in fields.items()}
            place.module.qconfig = overridden(base, values, place.paths[0])  # type: ignore[assignment]


def _held_qconfig(model: nn.Module, path: str, default: QConfig) -> QConfig | None:
    """The qconfig that the user gave this module or, nearest first, one around it."""
    found, module = default, model
    for name in path.split(".") if path else ():
        module = module._modules[name]  # type: ignore[assignment]
        found = module.__dict__.get("qconfig", found)
    return found


def _trial(fused: nn.Module, qconfig: QConfig, example_inputs: Examples | None, why: str) -> nn.Module:
    """A prepared copy, to see what reads what."""
    if example_inputs is None:
        raise ConfigError(
            f"prepare_by_target: {why} is seen in a recorded forward; give it one: prepare_by_target(model, "
            f"{str(qconfig.target)!r}, example_inputs=(x,))"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QBenchWarning)
        return prepare_qat(fused, qconfig=qconfig, example_inputs=example_inputs)


def _pass_to_producers(
    fused: nn.Module,
    qconfig: QConfig,
    example_inputs: Examples | None,
    places: _Places,
    asked: dict[_Place, _Asked],
) -> None:
    """Ask the modules whose codes another one reads for the width that it reads."""
    trial = dict(quantized_modules(_trial(fused, qconfig, example_inputs, "what a module with input_bits reads")))
    by_path = {path: place for place in places.all for path in place.paths}
    writers: dict[int, list[str]] = {}
    for path, module in trial.items():
        writers.setdefault(id(module.output_quantizer), []).append(path)
    for place, fields in list(asked.items()):
        order, bits = fields.get("input_bits", (-1, None))
        for path in place.paths if bits is not None else ():
            for writer in _written_before(trial.get(path), writers):
                before = asked[by_path[writer]].get("activation_bits", (-1, None))
                if before[0] <= order:
                    asked[by_path[writer]]["activation_bits"] = (order, bits)


def _written_before(module: QatModule | None, writers: dict[int, list[str]]) -> list[str]:
    """Paths of the modules whose output a module reads."""
    sources = module.sources if module is not None else None
    return [path for source in sources or () for path in writers.get(id(source), ())]


def _first_and_last(
    fused: nn.Module, qconfig: QConfig, example_inputs: Examples | None
) -> tuple[Override, ...]:
    """Overrides that widen the first and the last layer where the target wants that."""
    bits = qconfig.deployment.first_last_bits
    narrow = [spec.bits for spec in (qconfig.weight_spec, _activation_spec(qconfig)) if spec is not None]
    if bits is None or min(narrow) >= bits:
        return ()
    trial = _trial(fused, qconfig, example_inputs, f"the first and the last layer of target {qconfig.target}")
    called = _called_layers(trial, example_inputs)
    if not called:
        return ()
    first, last = exactly(called[0]), exactly(called[-1])
    if qconfig.weight_only:
        return tuple(Override(path, weight_bits=bits) for path in dict.fromkeys((first, last)))
    return (
        Override(first, weight_bits=bits, input_bits=bits),
        Override(last, weight_bits=bits, input_bits=bits, activation_bits=bits),
    )


def _activation_spec(qconfig: QConfig) -> Any:
    return None if qconfig.weight_only else qconfig.make_activation().spec


@torch.no_grad()
def _called_layers(trial: nn.Module, example_inputs: Any) -> list[str]:
    """Paths of the layers with a weight, in the order in which a forward calls them."""
    called: list[str] = []
    trial.eval()
    for path, module in quantized_modules(trial):
        if isinstance(module, QatLayer):
            module.register_forward_pre_hook(lambda _module, _inputs, path=path: called.append(path))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", QBenchWarning)  # no quantizer has seen data
        for inputs in example_inputs if isinstance(example_inputs, list) else [example_inputs]:
            trial(*inputs)
    return called


def _warn_of_vain_overrides(prepared: nn.Module) -> None:
    for applied in preparation_report(prepared).overrides:
        if not applied.modules:
            within = "; ".join(f"{part} is computed inside {layer}" for part, layer in applied.parts[:3])
            warnings.warn(
                f"override {applied.rule} changes nothing: "
                + (f"{within}. Name the layer instead" if within else "it names modules without anything to quantize"),
                QBenchWarning,
                stacklevel=3,
            )
