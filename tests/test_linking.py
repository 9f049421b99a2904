"""Links: which quantizer each layer has its input from, for every way that a tensor can take between two layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    Branchy,
    Calls,
    Gated,
    SmallNet,
    TwoHeads,
    assert_exact,
    conv_bn,
    images,
    links,
    quantizer_names,
    randomise_statistics,
    train,
    unobserved,
)
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.errors import LinkError
from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.body import QatModule

# Models that are not fused leave their BatchNorm in float, and preparation says so.
pytestmark = pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning")

Way = Callable[[Any, Tensor], Tensor]


def prepare(model: nn.Module, *examples: Any, **options: Any) -> nn.Module:
    """Prepared; one example is a forward's inputs."""
    given = {"example_inputs": list(examples)} if examples else {}
    return qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), **given, **options)


def two_layers(way: Way) -> nn.Module:
    """conv1, some way, conv2 (or fc where the way flattens)."""
    layers = {"conv1": nn.Conv2d(3, 4, 3), "conv2": nn.Conv2d(4, 4, 1), "fc": nn.Linear(400, 4)}
    modules = {"drop": nn.Dropout(0.5), "pool": nn.MaxPool2d(2), "relu": nn.ReLU(inplace=True)}
    return Calls(lambda m, x: way(m, m.conv1(x)), **layers, **modules)


# The grid of conv1's output is that of the next layer's input.
FOLLOWED: dict[str, Way] = {
    "directly": lambda m, y: m.conv2(y),
    "named input": lambda m, y: m.conv2(input=y),
    "max pool": lambda m, y: m.conv2(F.max_pool2d(y, 2)),
    "max pool module": lambda m, y: m.conv2(m.pool(y)),
    "adaptive max pool": lambda m, y: m.conv2(F.adaptive_max_pool2d(y, 3)),
    "flatten": lambda m, y: m.fc(torch.flatten(y, 1)),
    "reshape": lambda m, y: m.fc(y.reshape(y.shape[0], -1)),
    "view": lambda m, y: m.fc(y.view(-1, 400)),
    "dropout module": lambda m, y: m.conv2(m.drop(y)),
    "dropout": lambda m, y: m.conv2(F.dropout(y, 0.5, m.training)),
    "permute": lambda m, y: m.conv2(y.permute(0, 1, 3, 2)),
    "transpose and contiguous": lambda m, y: m.conv2(y.transpose(2, 3).contiguous()),
    "slice": lambda m, y: m.conv2(y[:, :, 1:-1, ::2]),
    "chunk": lambda m, y: m.conv2(torch.chunk(y, 2, dim=2)[1]),
    "split and stack": lambda m, y: m.conv2(torch.cat(torch.split(y, 2, dim=1)[::-1], 1)),
    "zero pad": lambda m, y: m.conv2(F.pad(y, (1, 2, 0, 1))),
    "reflection pad": lambda m, y: m.conv2(F.pad(y, (1, 1, 1, 1), mode="reflect")),
    "nearest upsample": lambda m, y: m.conv2(F.interpolate(y, scale_factor=2, mode="nearest")),
    "pixel unshuffle": lambda m, y: m.conv2(F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2)),
    "relu": lambda m, y: m.conv2(torch.relu(y)),
    "relu in place": lambda m, y: m.conv2(m.relu(y)),
    "relu in place, then max pool": lambda m, y: m.conv2(m.pool(m.relu(m.drop(y)))),
    "clone": lambda m, y: m.conv2(y.clone()),
    "flip": lambda m, y: m.conv2(y.flip(3)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name: str) -> None:
    model = prepare(two_layers(FOLLOWED[name]), (images(),))
    report = qbench.preparation_report(model)
    consumer = "fc" if "conv2" in report.unreached else "conv2"
    assert links(model)["conv1"] == ("conv1.input_quantizers.0",)
    assert links(model)[consumer] == ("conv1.output_quantizer",)
    assert [(found.path, found.index) for found in report.float_inputs] == [("conv1", 0)]


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed_ways_are_exact_after_convert(name: str) -> None:
    """A wrong link would show here: the layer's bias would lie on another grid than that of its input."""
    model = prepare(two_layers(FOLLOWED[name]), (images(),))
    del model._modules["conv2" if "conv2" in qbench.preparation_report(model).unreached else "fc"]
    train(model, images(), steps=2)
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


def _write_through_a_view(m: Any, y: Tensor) -> Tensor:
    y.view(-1)[::3] = 0.123
    return m.conv2(y)


def _write_to_the_base_of_a_view(m: Any, y: Tensor) -> Tensor:
    part = y[:, :, 2:]
    y.mul_(0.77)
    return m.conv2(part)


def _write_by_index(m: Any, y: Tensor) -> Tensor:
    y[:, 0] = y[:, 1] * 0.5
    return m.conv2(y)


def _write_in_place(m: Any, y: Tensor) -> Tensor:
    y += 0.1
    return m.conv2(y)


# The values left the grid: the next layer quantizes its input. The operator that the report must name.
LOST: dict[str, tuple[Way, str]] = {
    "sigmoid": (lambda m, y: m.conv2(torch.sigmoid(y)), "sigmoid"),
    "tanh, then max pool": (lambda m, y: m.conv2(F.max_pool2d(torch.tanh(y), 2)), "tanh"),
    "relu6": (lambda m, y: m.conv2(F.relu6(y)), "hardtanh"),
    "bilinear": (lambda m, y: m.conv2(F.interpolate(y, scale_factor=2, mode="bilinear")), "upsample_bilinear2d"),
    "average pool": (lambda m, y: m.conv2(F.avg_pool2d(y, 2)), "avg_pool2d"),
    "mean": (lambda m, y: m.conv2(y.mean((2, 3), keepdim=True)), "mean"),
    "softmax": (lambda m, y: m.conv2(y.softmax(1)), "softmax"),
    "times 2": (lambda m, y: m.conv2(y * 2), "mul"),
    "plus 1": (lambda m, y: m.conv2(y + 1), "add"),
    "minus itself": (lambda m, y: m.conv2(y - y.flip(1)), "sub"),
    "pad with ones": (lambda m, y: m.conv2(F.pad(y, (1, 1), value=1.0)), "constant_pad_nd"),
    "layer norm": (lambda m, y: m.conv2(F.layer_norm(y, y.shape[1:])), "layer_norm"),
    "dropout that is always on": (lambda m, y: m.conv2(F.dropout(y, 0.5, True)), "mul"),
    "in place": (_write_in_place, "add_"),
    "relu after in place": (lambda m, y: m.conv2(m.relu(y.mul_(2))), "mul_"),
}
# Nobody can say any more what wrote: what counts is that the link is void.
VOID: dict[str, Way] = {
    "through a view": _write_through_a_view,
    "to the base of a view": _write_to_the_base_of_a_view,
    "by index": _write_by_index,
}


@pytest.mark.parametrize("name", [*LOST, *VOID])
def test_lost(name: str) -> None:
    way, operator = LOST.get(name) or (VOID[name], "")
    model = prepare(two_layers(way), (images(),))
    assert links(model)["conv2"] == ("conv2.input_quantizers.0",)
    (lost,) = (found for found in qbench.preparation_report(model).float_inputs if found.path == "conv2")
    assert operator in lost.name and lost.origin == ("operator" if operator else "input")
    del model._modules["fc"]
    train(model, images(), steps=2)
    if "dropout" not in name:
        assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


def test_every_conv_and_linear_of_a_residual_net_knows_its_input() -> None:
    model = prepare(qbench.fuse(SmallNet()), (images(),))
    assert links(model) == {
        "conv1": ("conv1.input_quantizers.0",),
        "conv2": ("conv1.output_quantizer",),
        "conv3": ("conv2.output_quantizer",),
        "add": ("conv3.output_quantizer", "conv1.output_quantizer"),
        "gap": ("add.output_quantizer",),
        "fc": ("gap.output_quantizer",),
    }


# One quantizer where producers meet.

BOTH = (images(), True), (images(), False)


@pytest.mark.parametrize("examples", [BOTH, BOTH[::-1]], ids=["true first", "false first"])
def test_the_two_paths_of_a_branch_share_one_quantizer(examples: tuple[Any, ...]) -> None:
    model = prepare(Branchy(), *examples)
    shared = model.conv1.output_quantizer
    assert model.conv2.output_quantizer is shared
    assert model.conv3.sources == (shared,)
    (found,) = qbench.preparation_report(model).shared
    assert set(found.paths) == {"conv1", "conv2"}
    assert "conv3" in found.reason
    # Three inputs from outside: conv1 and conv2 read the same one on grids of their own.
    assert len(quantizer_names(model)) == len({id(q) for q in model.modules() if isinstance(q, FakeQuantize)})
    for cond in (True, False, True):
        model.train()(images(), cond)
    for cond in (True, False):
        assert_exact(model, qbench.convert(model.eval(), (images(), cond)), images(seed=3), cond)


def test_a_layer_on_pyramid_levels_has_one_quantizer_for_its_input() -> None:
    model = Calls(
        lambda m, x: [m.head(y) for y in (m.a(x), m.b(x), F.max_pool2d(m.c(x), 2))],
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(3, 4, 3, stride=2),
        c=nn.Conv2d(3, 4, 1),
        head=nn.Conv2d(4, 2, 1),
    )
    model = prepare(model, (images(),))
    shared = model.head.sources[0]
    assert model.a.output_quantizer is model.b.output_quantizer is model.c.output_quantizer is shared
    train(model, images(), steps=3)
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


def test_a_branch_that_passes_the_input_on_is_quantized_at_the_consumer() -> None:
    layers = {"a": nn.Conv2d(3, 3, 3), "b": nn.Conv2d(3, 4, 1)}
    model = Calls(lambda m, x: m.b(m.a(x) if x.shape[2] > 6 else x), **layers)
    model = prepare(model, (images(),), (images(size=6),))
    assert model.b.sources == (model.a.output_quantizer,)
    train(model, images(), steps=2)
    train(model, images(size=6), steps=1)
    for size in (12, 6):
        assert_exact(model, qbench.convert(model, (images(size=size),)), images(size=size, seed=3))


def test_a_concat_and_its_inputs_share() -> None:
    model = prepare(qbench.fuse(TwoHeads()), (images(),))
    shared = model.cat.output_quantizer
    assert {model.left[0].output_quantizer, model.right[0].output_quantizer, *model.cat.sources} == {shared}
    assert model.joined.sources == model.aux.sources == (shared,)
    assert any("cat" in found.reason for found in qbench.preparation_report(model).shared)


def test_a_functional_concat_of_one_grid_is_followed_and_of_two_is_not() -> None:
    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 1), "c": nn.Conv2d(8, 4, 1)}
    same = prepare(Calls(lambda m, x: m.c((lambda y: torch.cat([y, y.flip(2)], 1))(m.a(x))), **layers), (images(),))
    assert links(same)["c"] == ("a.output_quantizer",)
    two = prepare(Calls(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), **copy.deepcopy(layers)), (images(),))
    assert links(two)["c"] == ("c.input_quantizers.0",)
    assert any("cat" in found.reason for found in qbench.preparation_report(two).float_inputs)


def test_quantizers_that_must_become_one_but_differ() -> None:
    model = Branchy()
    model.conv2.qconfig = qbench.get_qconfig(activation_bits=4)
    with pytest.raises(LinkError, match="conv3") as error:
        prepare(model, *BOTH)
    assert all(word in str(error.value) for word in ("conv1", "conv2", "int4", "int8", "same qconfig"))


# When links are recorded.


@pytest.mark.parametrize("make", [SmallNet, Gated, TwoHeads], ids=lambda m: m.__name__)
def test_the_first_forward_is_recorded_and_finds_the_same(make: type[nn.Module]) -> None:
    fused = qbench.fuse(randomise_statistics(make()))
    told, late = prepare(fused, (images(),)), prepare(fused)
    assert not qbench.preparation_report(late).links_recorded
    assert set(links(late).values()) == {None}
    assert torch.equal(*(next(iter(_outputs(model.train()))) for model in (told, late)))
    assert qbench.preparation_report(late) == qbench.preparation_report(told)
    assert qbench.preparation_report(late).links_recorded
    assert links(late) == links(told)
    assert list(late.state_dict()) == list(told.state_dict())
    # Once only: a later forward does not record again.
    before = links(late)
    late(images())
    assert links(late) == before
    assert not late._forward_pre_hooks


def _outputs(model: nn.Module) -> list[Tensor]:
    out = model(images())
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.mark.parametrize("roundtrip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_made_before_the_first_forward_records_its_own(roundtrip: Callable[[nn.Module], nn.Module]) -> None:
    late = prepare(SmallNet())
    copied = roundtrip(late)
    copied(images())
    assert qbench.preparation_report(copied).links_recorded
    assert not qbench.preparation_report(late).links_recorded
    assert set(links(late).values()) == {None}
    late(images())
    assert links(late) == links(copied)


def test_the_first_forward_may_have_keyword_arguments_and_inference_mode() -> None:
    model = prepare(Branchy())
    with torch.inference_mode(), unobserved():
        model.eval()(cond=False, x=images())
    assert links(model)["conv3"] == ("conv2.output_quantizer",)
    assert qbench.preparation_report(model).unreached == ("conv1",)


def test_a_layer_that_no_forward_reached() -> None:
    model = prepare(Branchy(), (images(), True))
    assert qbench.preparation_report(model).unreached == ("conv2",)
    model(images(), True)
    for attempt in (lambda: model(images(), False), lambda: qbench.convert(model.eval(), (images(), True))):
        with pytest.raises(LinkError, match=r"conv2") as error:
            attempt()
        assert "example_inputs" in str(error.value)


class Auxiliary(nn.Module):
    """A head that runs in training only, as those of GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(3, 4), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)
        self.aux = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_a_head_that_runs_in_training_only_is_reached() -> None:
    model = prepare(qbench.fuse(Auxiliary()), (images(),))
    assert qbench.preparation_report(model).unreached == ()
    assert links(model)["aux"] == links(model)["head"] == ("body.0.output_quantizer",)


class Learned(FakeQuantize):
    """Has parameters of its own, as far as preparation knows."""

    learned = True


def test_learned_quantizers_need_examples() -> None:
    spec = qbench.get_qconfig().activation.spec
    qconfig = qbench.QConfig(activation=qbench.QuantizerConfig(spec, fake_quantize=Learned))
    with pytest.raises(LinkError, match="example_inputs="):
        qbench.prepare_qat(SmallNet(), qconfig=qconfig)
    model = qbench.prepare_qat(SmallNet(), qconfig=qconfig, example_inputs=(images(),))
    assert qbench.preparation_report(model).links_recorded


# Copies, and what recording leaves behind.


@pytest.mark.parametrize("roundtrip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("make", [SmallNet, Gated, TwoHeads], ids=lambda m: m.__name__)
def test_links_point_into_the_copy(make: type[nn.Module], roundtrip: Callable[[nn.Module], nn.Module]) -> None:
    model = prepare(qbench.fuse(make()), (images(),))
    copied = roundtrip(model)
    assert links(copied) == links(model)
    inside, outside = ({id(m) for m in tree.modules()} for tree in (copied, model))
    sources = [source for m in copied.modules() if isinstance(m, QatModule) for source in m.sources]
    assert all(id(source) in inside and id(source) not in outside for source in sources)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(copied, images(), steps=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_exact(copied, qbench.convert(copied, (images(),)), images(seed=3))


class Noisy(nn.Module):
    """Everything that a forward could move: random numbers, statistics, buffers of its own, modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(3, 8)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Sequential(*conv_bn(8, 8)).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + 0.01 * torch.randn_like(x))
        return self.frozen(self.drop(F.dropout(self.bn(self.conv(x)), 0.5)))


@pytest.mark.parametrize("training", [True, False])
def test_recording_changes_nothing(training: bool) -> None:
    model = randomise_statistics(Noisy()).train(training)
    model.frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    fused = qbench.fuse(model)
    quiet, recorded = prepare(fused), prepare(fused, (images(),), (images(),))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    state = recorded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in quiet.state_dict().items())
    assert not any(quantizer.seen_data and not quantizer.observer.stateless for quantizer in quantizer_names(recorded))
    assert all(quantizer.fake_quant_enabled for quantizer in quantizer_names(recorded))
    found = {name: module.training for name, module in recorded.named_modules()}
    assert {name: mode for name, mode in found.items() if name in modes} == modes
    assert {mode for name, mode in found.items() if name.startswith("frozen")} == {False}


def test_switched_off_quantizers_stay_switched_off() -> None:
    late = prepare(SmallNet())
    late.apply(qbench.disable_fake_quant)
    late(images())
    activations = [quantizer for quantizer in quantizer_names(late) if not quantizer.observer.stateless]
    assert not any(quantizer.fake_quant_enabled for quantizer in activations)


class Detour(nn.Module):
    """`head` reads either convolution; each of them is also read on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.head(b if second else a)


@pytest.mark.parametrize("training", [True, False])
def test_a_producer_that_is_first_met_after_the_recording_is_refused(training: bool) -> None:
    model = qbench.prepare_qat(Detour(), qconfig=qbench.get_qconfig(), example_inputs=(images(),))
    model(images())
    model.train(training)
    with pytest.raises(LinkError, match=r"from b\.output_quantizer.*recorded one is a\.output_quantizer.*example_in"):
        model(images(), True)
    model(images())
    both = qbench.prepare_qat(
        Detour(), qconfig=qbench.get_qconfig(), example_inputs=[(images(), False), (images(), True)]
    )
    both(images(), True)
    both(images(), False)
    assert both.a.output_quantizer is both.b.output_quantizer


def test_a_saved_output_carries_no_quantizer(tmp_path: Any) -> None:
    model = qbench.prepare_qat(Detour(), qconfig=qbench.get_qconfig(), example_inputs=(images(),))
    torch.save(model(images()), tmp_path / "y.pt")
    assert torch.load(tmp_path / "y.pt", weights_only=True).shape[1] == 2


def test_a_view_of_what_was_written_to_keeps_its_link() -> None:
    # A mean over the plane of a permuted tensor ends in as_strided_; the flatten behind it is a view of that.
    class Permute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 3, 1, 2)

    parts = (nn.Linear(3, 3), Permute(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(3, 2))
    x = torch.randn(2, 8, 8, 3)
    qat = qbench.prepare_qat(nn.Sequential(*parts), qconfig=qbench.get_qconfig(), example_inputs=(x,))
    assert [found.path for found in qbench.preparation_report(qat).float_inputs] == ["0"]
    assert qat[4].sources[0] is qat[2].output_quantizer


def test_the_report_says_where_float_inputs_come_from() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.mul(m.add(m.conv(x), m.offset), m.conv(x).sin())

    model = Calls(forward, conv=nn.Conv2d(3, 4, 1), add=qbench.nn.Add(), mul=qbench.nn.Mul())
    model.offset = nn.Parameter(torch.randn(4, 1, 1))
    found = qbench.preparation_report(prepare(model, (images(),))).float_inputs
    assert {(given.path, given.index, given.origin, given.name): given.reason for given in found} == {
        ("conv", 0, "input", ""): "an input of the model, or made in float",
        ("add", 1, "stored", "offset"): "offset is stored in the model",
        ("mul", 1, "operator", "aten.sin"): "aten.sin leaves the grid",
    }
