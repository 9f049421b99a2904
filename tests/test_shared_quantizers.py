"""Quantizers that one forward uses several times, in whole models: how often, and that their range covers every use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Branchy, Calls, TwoHeads, assert_exact, images, leaves, train, unobserved
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.fake_quantize import FakeQuantize
from qbench.nn import intrinsic as nni
from qbench.nn.intrinsic import qat as nniqat
from qbench.observers import MovingAverageMinMaxObserver

# Models that are not fused leave their BatchNorm in float, and preparation says so.
pytestmark = pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning")

WIDER = 20.0


def conv(inputs: int, outputs: int, factor: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 1)
    with torch.no_grad():
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)
    return layer


def cat() -> nn.Module:
    """Two convolutions into one concat, one of them wider."""
    return Calls(
        lambda m, x: m.head(m.cat([m.a(x), m.b(x)])),
        a=conv(3, 4), b=conv(3, 4, WIDER), cat=qbench.nn.Cat(1), head=conv(8, 2),
    )  # fmt: skip


def pyramid() -> nn.Module:
    """A head that is called on three levels, the widest of them first."""

    def forward(m: Any, x: Tensor) -> list[Tensor]:
        return [m.head(level) for level in (m.c(x), F.max_pool2d(m.b(x), 2), m.a(x[:, :, ::4, ::4]))]

    return Calls(forward, a=conv(3, 4), b=conv(3, 4, 5.0), c=conv(3, 4, WIDER), head=conv(4, 2))


class DenseList(nn.Module):
    """Each layer reads the concat of all before it, as in DenseNet; the second is the widest."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 4), conv(4, 4, WIDER), conv(8, 4, 0.1), conv(12, 4, 0.01)])
        self.cats = nn.ModuleList([qbench.nn.Cat(1) for _ in range(3)])
        self.head = conv(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.layers[0](x)]
        joined = found[0]
        for layer, join in zip(list(self.layers)[1:], self.cats, strict=True):
            found.append(layer(joined))
            joined = join(found)
        return self.head(joined)


# Model, the quantizer that is shared, its uses in one forward, and the module whose output is the widest.
SHARED: dict[str, tuple[Callable[[], nn.Module], str, int, str]] = {
    "cat": (cat, "cat.output_quantizer", 3, "b"),
    "pyramid": (pyramid, "a.output_quantizer", 3, "c"),
    "dense list": (DenseList, "layers.0.output_quantizer", 7, "layers.1"),
}
shared = pytest.mark.parametrize("name", SHARED)


def prepared(make: Callable[[], nn.Module], *examples: Any, constant: float = 0.2, **options: Any) -> nn.Module:
    """Prepared with an average that moves fast, from the seed 0."""
    torch.manual_seed(0)
    config = qbench.QuantizerConfig(qbench.QSpec(bits=8), observer_options={"averaging_constant": constant})
    qconfig = qbench.get_qconfig(**options) if options else qbench.QConfig(activation=config)
    return qbench.prepare_qat(make(), qconfig=qconfig, example_inputs=list(examples) or (images(),))


def without_uses(model: nn.Module) -> nn.Module:
    """A copy in which every observer takes each tensor for itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, MovingAverageMinMaxObserver) and not module.stateless:
            module.expect(1)
    return model


def run(model: nn.Module, steps: int, start: int = 0) -> nn.Module:
    """Training-mode forwards, in which nothing but the ranges moves."""
    model.train()
    with torch.no_grad():
        for seed in range(start, start + steps):
            model(images(seed=seed))
    return model


def uses(model: nn.Module) -> dict[str, int]:
    """Path of each quantizer whose observer averages → how many tensors a forward shows it."""
    return {
        name: module.observer.uses
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantize) and isinstance(module.observer, MovingAverageMinMaxObserver)
    }


def width(quantizer: FakeQuantize) -> float:
    return float(quantizer.scale) * 255


def needed(model: nn.Module, path: str, steps: int) -> float:
    """Mean width of the widest tensor that the quantizer of this module is shown."""
    model = copy.deepcopy(model).apply(qbench.disable_fake_quant)
    quantizer = model.get_submodule(path).output_quantizer
    widths: list[float] = []  # of what the quantizer is shown in one forward, a concat of it all included

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        widths.append(float(inputs[0].max() - inputs[0].min()))

    quantizer.register_forward_pre_hook(note)
    found = []
    for seed in range(steps):
        widths.clear()
        run(model, 1, seed)
        found.append(max(widths))
    return sum(found) / steps


class TestRange:
    @shared
    def test_it_covers_every_use_and_not_their_mean(self, name: str) -> None:
        make, path, count, widest = SHARED[name]
        model = prepared(make)
        quantizer = model.get_submodule(path)
        assert quantizer.observer.uses == count
        assert model.get_submodule(widest).output_quantizer is quantizer
        steps = 15
        found, before = (run(one, steps).get_submodule(path) for one in (copy.deepcopy(model), without_uses(model)))
        wanted = needed(model, widest, steps)
        assert 0.9 * wanted < width(found) < 1.15 * wanted
        assert width(before) < 0.8 * wanted

    @shared
    def test_nothing_that_is_trained_differs_from_what_is_converted(self, name: str) -> None:
        model = prepared(SHARED[name][0])
        train(model, images(), steps=3, rate=1e-3)
        assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))

    @shared
    @pytest.mark.parametrize("observer", ["quantile", "mse", "power_of_two"])
    def test_every_observer_that_averages(self, name: str, observer: str) -> None:
        make, path, count, _ = SHARED[name]
        model = prepared(make, observer=observer)
        for module in model.modules():
            if isinstance(module, FakeQuantize):
                module.observer.steps = 3  # of MSE: a coarse search is enough
        assert model.get_submodule(path).observer.uses == count
        found, before = (run(one, 8).get_submodule(path) for one in (copy.deepcopy(model), without_uses(model)))
        assert width(found) > 1.2 * width(before)

    @pytest.mark.parametrize("method", ["lsq_plus", "tqt"])
    def test_it_is_where_a_learned_scale_starts(self, method: str) -> None:
        config = qbench.get_qconfig(method=method, observer="moving_average")
        model = qbench.prepare_qat(cat(), qconfig=config, example_inputs=(images(),))
        run(model, 3)
        wanted = needed(model, "b", 3)
        assert width(model.cat.output_quantizer) > 0.9 * wanted

    def test_both_ways_of_a_training_step_give_the_same_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = prepared(lambda: qbench.fuse(TwoHeads()))
        assert model.cat.output_quantizer.observer.uses == 3
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        train(one, images(), steps=4)
        monkeypatch.setattr("qbench.nn.qat.body.fused_epilogue", lambda *_: None)
        train(other, images(), steps=4)
        expected = other.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in one.state_dict().items())


class ConvMish2d(nni.Fused):
    part_types = (nn.Conv2d, nn.Mish)


class QatConvMish2d(nniqat.ConvReLU2d):
    float_type = ConvMish2d
    activation = nn.Mish


class TestCounts:
    def test_what_is_used_once_is_counted_once(self) -> None:
        model = prepared(lambda: nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4)))
        assert set(uses(model).values()) == {1}
        assert not any("recent" in key for key in model.state_dict())

    def test_a_module_that_is_called_again(self) -> None:
        # `head` reads a float input at each level, puts out three tensors, and has a quantizer before its activation.
        def forward(m: Any, x: Tensor) -> list[Tensor]:
            return [m.head(level * 2) for level in (x, x[:, :, ::2], x[:, :, 1:])]

        model = qbench.prepare_qat(
            Calls(forward, head=ConvMish2d(conv(3, 4), nn.Mish())),
            {ConvMish2d: QatConvMish2d},
            qconfig=qbench.get_qconfig(),
            example_inputs=(images(),),
        )
        assert uses(model) == {
            "head.input_quantizers.0": 3, "head.pre_activation_quantizer": 3, "head.output_quantizer": 3
        }  # fmt: skip

    def test_branches_of_control_flow_count_and_examples_of_one_path_do_not(self) -> None:
        x = images()
        both = prepared(Branchy, (x, True), (x, False))
        assert both.conv1.output_quantizer.observer.uses == 2 and both.conv3.output_quantizer.observer.uses == 1
        same = prepared(Branchy, (x, True), (images(size=8), True))
        assert set(uses(same).values()) == {1}

    def test_the_most_calls_of_one_forward_count(self) -> None:
        def forward(m: Any, x: Tensor) -> list[Tensor]:
            return [m.head(m.stem(part)) for part in x.split(2)]

        model = prepared(
            lambda: Calls(forward, stem=conv(3, 4), head=conv(4, 2)), *[(images(n),) for n in (2, 6, 4)]
        )
        assert model.stem.output_quantizer.observer.uses == 3

    def test_a_part_that_runs_in_training_only(self) -> None:
        class Auxiliary(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.aux = nn.Sequential(conv(3, 4)), nn.Sequential(conv(4, 2))

            def forward(self, x: Tensor) -> list[Tensor]:
                y = self.body(x)
                return [y, self.aux(y), self.aux(y[:, :, 1:])] if self.training else [y]

        model = prepared(Auxiliary)
        assert model.aux[0].output_quantizer.observer.uses == 2 and model.body[0].output_quantizer.observer.uses == 1

    @shared
    def test_the_first_forward_counts_the_same(self, name: str) -> None:
        make = SHARED[name][0]
        torch.manual_seed(0)
        late = qbench.prepare_qat(make(), qconfig=qbench.get_qconfig())
        with unobserved():
            late.eval()(images())
        assert uses(late) == uses(prepared(make))

    def test_models_whose_number_of_calls_varies(self) -> None:
        def forward(m: Any, x: Tensor) -> list[Tensor]:
            return [m.head(m.stem(part)) for part in x.split(1)]

        model = prepared(lambda: Calls(forward, stem=conv(3, 4), head=conv(4, 2)), (images(3),)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for count in (1, 5, 3, 2, 4):
            optimizer.zero_grad()
            sum(out.square().mean() for out in model(images(count, seed=count))).backward()
            optimizer.step()
        assert_exact(model.eval(), qbench.convert(model, (images(2),)), images(2))


def without_window(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a version that had none wrote it."""
    return {key: value for key, value in state.items() if not key.endswith("observer.recent")}


class TestState:
    @shared
    def test_a_checkpoint_without_the_window(self, name: str) -> None:
        make, path, _, _ = SHARED[name]
        model = run(prepared(make), 5)
        old = without_window(model.state_dict())
        assert len(old) < len(model.state_dict())
        fresh = prepared(make)
        result = fresh.load_state_dict(old, strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(*(leaves(one.eval()(images(seed=9)))[0] for one in (fresh, model)))
        before = width(fresh.get_submodule(path))
        assert width(run(fresh, 1, start=5).get_submodule(path)) >= 0.999 * before

    @pytest.mark.parametrize("turned", [False, True])
    def test_a_checkpoint_of_a_model_that_was_recorded_with_other_examples(self, turned: bool) -> None:
        def forward(m: Any, x: Tensor) -> list[Tensor]:
            return [m.head(m.stem(part)) for part in x.split(2)]

        kinds = [
            prepared(lambda: Calls(forward, stem=conv(3, 4), head=conv(4, 2)), (images(count),)) for count in (2, 6)
        ]
        model, fresh = kinds[::-1] if turned else kinds
        counts = uses(fresh)
        result = fresh.load_state_dict(run(model, 5).state_dict(), strict=True)
        assert not result.missing_keys and not result.unexpected_keys and uses(fresh) == counts
        assert all(map(torch.equal, fresh.eval()(images()), model.eval()(images())))
        run(fresh, 3)
        assert torch.isfinite(fresh.stem.output_quantizer.scale)

    @shared
    def test_training_goes_on_as_it_would_have(self, name: str) -> None:
        model = run(prepared(SHARED[name][0]), 5)
        fresh = prepared(SHARED[name][0])
        fresh.load_state_dict(model.state_dict(), strict=True)
        twins = [fresh, copy.deepcopy(model)]
        if name == "dense list":  # the others have functions of this file in them
            twins.append(pickle.loads(pickle.dumps(model)))
        wanted = run(model, 3, start=5).state_dict()
        for twin in twins:
            found = run(twin, 3, start=5).state_dict()
            assert all(torch.equal(found[key], value) for key, value in wanted.items())

    def test_a_move(self) -> None:
        model = run(prepared(DenseList), 2).to("meta")
        assert all(buffer.is_meta for buffer in model.buffers())
        model.train()(images().to("meta"))  # a value that is read on the host would raise

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of its own doing
    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
    @shared
    def test_compiled_steps(self, name: str) -> None:
        torch.compiler.reset()
        model = prepared(SHARED[name][0])
        eager, other = copy.deepcopy(model).train(), copy.deepcopy(model).train()
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(4):
                for one in (eager, compiled):
                    sum(out.square().mean() for out in leaves(one(images(seed=seed)))).backward()
        for (key, value), wanted in zip(other.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, msg=key)
