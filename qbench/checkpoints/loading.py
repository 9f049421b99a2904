"""A QAT checkpoint of torch.ao or MQBench → a prepared qbench model, every key accounted for.

    weights, biases, BatchNorm       bit by bit, under the same names
    activation grids                 scale to the bit, zero point in our codes (see grids.py), and the observed range
    switches                         observer and fake-quant of each activation quantizer
    weight quantizers                a learned scale where ours is learned; else none, as it follows from the weight

Everything is worked out before the first tensor of the model is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbench.checkpoints import grids
from qbench.checkpoints.mqbench_names import NodeNames, Place
from qbench.checkpoints.report import IGNORED, TAKEN, TRANSLATED, CheckpointReport, KeyOutcome, MissingValue
from qbench.checkpoints.source import NUMBERED, Source, SourceQuantizer, present_name, read_source, without_prefix
from qbench.checkpoints.writing import set_grid, set_weight_scale
from qbench.errors import ConfigError, PreparationError
from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.qparams import QParams
from qbench.preparation import preparation_report
from qbench.report.preparation import FloatOrigin

_OUTPUT = "output_quantizer"
_AVERAGES = ("aten.mean", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d")


def load_qat_checkpoint(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    strict: bool = True,
    codes: tuple[int, int] | None = None,
    names: Mapping[str, str] | None = None,
) -> CheckpointReport:
    """Load a QAT checkpoint of torch.ao's eager mode or of MQBench into a model that `prepare_qat` made.

    Args:
        model: Prepared from the same float model, fused alike, with `example_inputs`; changed in place.
        state_dict: Of the prepared, not the converted, model.
        strict: Every parameter and statistic of the model must be in the checkpoint and the other way round, and no
            activation grid may be of another width; otherwise they are reported.
        codes: Lowest and highest activation code of the source, (0, 255) say; by default they follow from the grids and
            the ranges that the observers saw.
        names: Where quantizers of the source belong whose place cannot be told: its name in the source (the path of a
            module, or an fx node without `_post_act_fake_quantizer`) → the key of the quantizer in the model, such as
            `"conv1.input_quantizers.0"`.

    Returns:
        What became of every key, and what of the model the checkpoint says nothing of.

    Raises:
        ConfigError: no such checkpoint, or, when strict, weights or widths that do not fit. The model is unchanged.
        PreparationError: the model is not prepared, or its links are not known yet.
    """
    if not preparation_report(model).links_recorded:
        raise PreparationError(
            "load_qat_checkpoint: the links of this model are not known yet, so its input has no quantizer; "
            "prepare_qat(model, …, example_inputs=(x,)) records them"
        )
    given = without_prefix(state_dict)
    source = read_source(given)
    plan = _Plan(model, source, strict=strict)
    plan.plain_tensors()
    plan.quantizers(codes, dict(names or {}))
    plan.left_over()
    plan.apply()
    renamed = dict(zip(given, state_dict, strict=True))
    keys = {found.key: dataclasses.replace(found, key=renamed[found.key]) for found in plan.outcomes}
    ordered = tuple(keys[key] for key in given if key in keys)
    return CheckpointReport(source.kind, ordered, tuple(plan.missing))


@dataclasses.dataclass(frozen=True)
class _Match:
    """A quantizer of the source and the place that it has here."""

    source: SourceQuantizer
    place: str
    direct: bool
    note: str


class _Plan:
    """What is to be written, and what is said of every key."""

    def __init__(self, model: nn.Module, source: Source, *, strict: bool) -> None:
        self.model, self.source, self.strict = model, source, strict
        self.report = preparation_report(model)
        self.outcomes: list[KeyOutcome] = []
        self.missing: list[MissingValue] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.grids: dict[FakeQuantize, tuple[QParams, SourceQuantizer | None]] = {}
        self.weights: list[tuple[QatLayer, SourceQuantizer]] = []
        self.modules = {path: m for path, m in model.named_modules() if isinstance(m, QatModule)}
        self.at = {
            path: m for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, FakeQuantize)
        }

    # Parameters and statistics.

    def plain_tensors(self) -> None:
        """Match tensors by name and shape."""
        quantizers = tuple(f"{path}." for path in self.at)
        weights = {name for name, m in self.model.named_modules() if name.endswith("weight_quantizer")}
        own = {
            name: tensor
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]
            if not name.startswith((*quantizers, *(f"{name}." for name in weights)))
        }
        faults = []
        for key, tensor in self.source.plain.items():
            name = key if key in own else present_name(key)
            mine = own.pop(name, None)
            if mine is None:
                faults.append(f"{key} has no place in the model")
                self._say(key, IGNORED, note="the model has no such parameter or buffer")
            elif mine.shape != tensor.shape:
                faults.append(f"{key} is {tuple(tensor.shape)}, the model's {tuple(mine.shape)}")
                self._say(key, IGNORED, note=f"shape {tuple(tensor.shape)}, the model's is {tuple(mine.shape)}")
            else:
                self.copies.append((mine, tensor))
                self._say(key, TAKEN, name)
        for name in own:
            if not name.endswith("num_batches_tracked"):
                faults.append(f"the checkpoint has no {name}")
            self.missing.append(MissingValue(name, "keeps its value"))
        if faults and self.strict:
            more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ConfigError(
                f"load_qat_checkpoint: {'; '.join(faults[:3])}{more}. Fuse and prepare the same float model as in the "
                "source; strict=False loads what fits and reports the rest"
            )

    # Grids of activations.

    def quantizers(self, codes: grids.Codes | None, names: dict[str, str]) -> None:
        """Find the place of every activation quantizer and translate its grid."""
        unknown = sorted(set(names) - set(self.source.outputs))
        if unknown or not set(names.values()) <= set(self.at):
            wrong = unknown[0] if unknown else next(path for path in names.values() if path not in self.at)
            known = ", ".join(list(self.source.outputs if unknown else self.at)[:4])
            raise ConfigError(
                f"names: {wrong!r} is no quantizer of the {'checkpoint' if unknown else 'model'}; {known}, … are"
            )
        by_quantizer: dict[FakeQuantize, list[_Match]] = {}
        for match in self._matches(names):
            by_quantizer.setdefault(self.at[match.place], []).append(match)
        for quantizer, matches in by_quantizer.items():
            best = self._best(quantizer, matches)
            for match in matches:
                if match is best:
                    self._translate(quantizer, match, codes)
                else:
                    shared = match.note or "both became one quantizer"
                    self._ignore(match.source, f"{match.place} has the grid of {best.source.name}: {shared}")

    def _matches(self, names: dict[str, str]) -> list[_Match]:
        nodes = NodeNames(self.model) if self.source.kind == "MQBench" else None
        inputs = {id(self.at[path]): path for path in self._float_inputs("input")}
        found, open_ = [], []
        for name, quantizer in self.source.outputs.items():
            if not quantizer.seen_data:
                self._ignore(quantizer, "it saw no data")
            elif name in names:
                found.append(_Match(quantizer, names[name], True, "as names= says"))
            else:
                place = self._place(name) if nodes is None else nodes.place(name)
                path = "" if place is None else f"{place.path}.{_OUTPUT}".lstrip(".")
                if place is not None and path in self.at:
                    found.append(_Match(quantizer, path, place.direct, place.note))
                else:
                    open_.append(quantizer)
        # What has no module that quantizes its output is an input of the model: a stub, or an argument.
        taken = {id(self.at[match.place]) for match in found}
        free = [path for key, path in inputs.items() if key not in taken]
        entries = [quantizer for quantizer in open_ if self._is_entry(quantizer.name, nodes)]
        for quantizer in open_:
            if quantizer in entries and len(entries) == len(free) == 1:
                found.append(_Match(quantizer, free[0], True, "the only input of the model"))
            else:
                self._ignore(quantizer, self._no_place(quantizer.name, free if quantizer in entries else []))
        return found

    def _float_inputs(self, origin: FloatOrigin, name: str = "") -> list[str]:
        """Keys of the quantizers of inputs that arrive in float from somewhere, in the order of execution."""
        found = [f"{known.path}.input_quantizers.{known.index}" for known in self.report.float_inputs
                 if (known.origin, known.name) == (origin, name)]  # fmt: skip
        return [path.lstrip(".") for path in found if path.lstrip(".") in self.at]

    def _place(self, path: str) -> Place | None:
        return Place(path, direct=True) if path in self.modules else None

    def _is_entry(self, name: str, nodes: NodeNames | None) -> bool:
        """Whether a quantizer may be that of the model's input."""
        if nodes is not None:
            return name not in nodes.paths
        module = dict(self.model.named_modules()).get(name)
        return type(module) is nn.Identity

    def _no_place(self, name: str, free: list[str]) -> str:
        if free:
            return f"it may be any of the inputs {', '.join(free)}: names={{{name!r}: {free[0]!r}}} says which"
        if NUMBERED.fullmatch(name):
            return f"torch.ao's FX mode numbers its quantizers: names={{{name!r}: 'fc.{_OUTPUT}'}} would say its place"
        module = dict(self.model.named_modules()).get(name)
        kind = f"a {type(module).__name__}" if module is not None else "this value"
        return f"no quantizer follows {kind} here: it stays on the grid of its input, or is computed inside a layer"

    def _best(self, quantizer: FakeQuantize, matches: list[_Match]) -> _Match:
        """Where several grids become one: that of the module that joins them, else the coarsest, which holds all."""
        own = [match for match in matches if match.direct] or matches
        joining = [match for match in own if self._joins(match.place)]
        return max(joining or own, key=lambda match: float(match.source.tensors["scale"].max()))

    def _joins(self, place: str) -> bool:
        module = self.modules.get(place.removesuffix(_OUTPUT).rstrip("."))
        return module is not None and module.float_type.__name__ in module.qconfig.deployment.shared_ops

    def _translate(self, quantizer: FakeQuantize, match: _Match, codes: grids.Codes | None) -> None:
        found = codes or grids.codes_of(match.source)
        how = "" if found else "codes of the model's width assumed"
        found = found or grids.assumed_codes(list(self.source.outputs.values()), quantizer.spec)
        try:
            qparams = grids.translated_grid(match.source, found, quantizer.spec)
        except ConfigError as error:
            if self.strict:
                raise ConfigError(f"load_qat_checkpoint: quantizer {match.source.name}: {error}") from None
            self._ignore(match.source, str(error))
            return
        known = quantizer.known_grid
        if known is not None and known != (float(qparams.scale), int(qparams.zero_point)):
            self._ignore(match.source, f"{match.place} has a grid that is known without it: scale {known[0]:.6g}")
            return
        self.grids[quantizer] = qparams, match.source
        offset = quantizer.spec.qmin - found[0]
        for entry, key in match.source.keys.items():
            self._say_entry(entry, key, match, "; ".join(part for part in (match.note, how) if part), offset)

    def _say_entry(self, entry: str, key: str, match: _Match, note: str, offset: int) -> None:
        name = entry.rpartition(".")[2]
        to = f"{match.place}.{name}"
        if entry == "scale":
            self._say(key, TAKEN, to, note)
        elif entry == "zero_point":
            moved = f"codes numbered {offset:+d}" if offset else "the same codes"
            self._say(key, TRANSLATED, to, f"{moved}; {note}" if note else moved)
        elif name in ("min_val", "max_val"):
            self._say(key, TAKEN, f"{match.place}.observer.{name}")
        elif name in ("observer_enabled", "fake_quant_enabled"):
            self._say(key, TRANSLATED, to.replace(name, "_extra_state"), "a switch")
        else:
            self._say(key, IGNORED, note="a constant of the source's observer")

    # The rest.

    def left_over(self) -> None:
        """Say what becomes of weight and bias quantizers, and which quantizers of ours got no grid."""
        for path, found in self.source.weights.items():
            self._weight_quantizer(path, found)
        for key in self.source.biases:
            self._say(key, IGNORED, note="the grid of a bias follows from the scales of input and weight")
        for path, module in self.modules.items():
            quantizer = module.output_quantizer
            if quantizer is None or quantizer in self.grids:
                continue
            if module.sources and _averages(module):
                self._average(f"{path}.{_OUTPUT}".lstrip("."), module.sources[0])
        for operator in _AVERAGES:
            read = [found.reads for found in self.report.float_operations if found.operator == operator]
            places = self._float_inputs("operator", operator)
            # Both in the order of execution.
            for path, reads in zip(places, read, strict=True) if len(places) == len(read) else ():
                if len(reads) == 1:
                    self._average(path, self.modules[reads[0]].output_quantizer)
        for path, quantizer in self.at.items():
            if quantizer not in self.grids and quantizer.known_grid is not None:
                self.grids[quantizer] = grids.known_grid(quantizer.known_grid, quantizer.spec), None
                self.missing.append(MissingValue(path, "has the grid that is known before any data"))
        seen: set[int] = set()
        for path, quantizer in self.at.items():
            if quantizer not in self.grids and not quantizer.observer.stateless and id(quantizer) not in seen:
                self.missing.append(MissingValue(path, "no grid: training-mode forwards on real data give it one"))
            seen.add(id(quantizer))

    def _average(self, path: str, source: FakeQuantize | None) -> None:
        """What is averaged stays on its grid in the source."""
        if source in self.grids and self.at[path] not in self.grids:
            self.grids[self.at[path]] = self.grids[source][0], None
            self.missing.append(MissingValue(path, "takes the grid of its input, where the source computes averages"))

    def _weight_quantizer(self, path: str, found: SourceQuantizer) -> None:
        layer, scale = self.modules.get(path), found.find("scale")
        if not isinstance(layer, QatLayer) or not layer.weight_quantizer.learned or scale is None:
            self._ignore(found, "the grid of a weight follows from the weight and BatchNorm at hand")
            return
        room = layer.weight_quantizer.scale
        if scale.numel() != room.numel():
            self._ignore(found, f"{scale.numel()} scales, where this weight has {room.numel()}")
            return
        self.weights.append((layer, found))
        for entry, key in found.keys.items():
            if entry == "scale":
                note = "of the weight before BatchNorm is folded into it" if layer.bn is not None else ""
                self._say(key, TRANSLATED, f"{path}.weight_quantizer.start", note)
            else:
                self._say(key, IGNORED, note="a learned scale of symmetric codes needs no more than itself")

    @torch.no_grad()
    def apply(self) -> None:
        """Write everything that was planned."""
        for mine, tensor in self.copies:
            mine.copy_(tensor)
        for quantizer, (qparams, source) in self.grids.items():
            set_grid(quantizer, qparams, source)
        for layer, found in self.weights:  # after BatchNorm is there
            set_weight_scale(layer, found.tensors["scale"])

    def _say(self, key: str, outcome: str, to: str = "", note: str = "") -> None:
        self.outcomes.append(KeyOutcome(key, outcome, to, note))

    def _ignore(self, quantizer: SourceQuantizer, reason: str) -> None:
        for key in quantizer.keys.values():
            self._say(key, IGNORED, note=reason)


def _averages(module: QatModule) -> bool:
    name = module.float_type.__name__
    return "AvgPool" in name or name == "Mean"
