"""Generated code against the plain path: codes for the same statistics, training, life without a compiler."""

from __future__ import annotations

import copy
import functools
import logging
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.nn.qat import epilogue as epilogue_module
from qbench.nn.qat import fast_parameters
from qbench.nn.qat.epilogue import rule_of
from qbench.nn.qat.layer import QatLayer
from qbench.numerics import generated as generated_module
from qbench.numerics import generated_epilogue, generated_rounding
from qbench.numerics.fused import Statistics
from qbench.numerics.generated import Generated
from qbench.numerics.generated_epilogue import Moved, generated_code, normalize_clip_quantize
from qbench.numerics.layer_step import normalized
from qbench.numerics.qparams import QSpec, fake_quantize, inside_range
from qbench.observers import MovingAverageMinMaxObserver

from .support import without_native

# Compiling takes its time: the second layout is for the long run.
LAYOUTS = (
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels_last", marks=pytest.mark.slow),
)


@pytest.fixture(autouse=True)
def generated_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ is the business of test_native.py."""
    without_native(monkeypatch)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 7, 1, bias=False),
        nn.BatchNorm2d(7),
    )


def prepared(model: nn.Module) -> nn.Module:
    images = (torch.randn(2, 3, 12, 12),)
    return qbench.prepare_qat(qbench.fuse(model), qconfig=qbench.get_qconfig(), example_inputs=images).train()


def batches(memory_format: torch.memory_format = torch.contiguous_format, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 3, 12, 12, generator=generator) * 2 + 1).contiguous(memory_format=memory_format)
        for _ in range(count)
    ]


def trained(model: nn.Module, images: list[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """The outputs of each step, and the model behind them."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    found = []
    for x in images:
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        found.append(y.detach())
    return model, found


def generated_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The generated functions that are called from now on, by the compiled code that answers."""
    calls: list[str] = []
    plain = Generated.__call__

    def noted(self: Generated, *tensors: Tensor | None) -> object:
        found = plain(self, *tensors)
        calls.append(self.failed or "generated")
        return found

    monkeypatch.setattr(Generated, "__call__", noted)
    return calls


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_codes_and_masks_are_those_of_the_steps_for_the_same_statistics(memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(2)
    rule = rule_of(MovingAverageMinMaxObserver(QSpec()))
    last = memory_format is torch.channels_last
    code = generated_code(last, 0.1, 1e-5, 0.0, math.inf, QSpec(), rule, "cpu")
    assert code.ready()
    different, values, masked = 0, 0, 0
    for shape in ((4, 24, 9, 9), (2, 7, 33, 5), (16, 130, 1, 1), (3, 64, 28, 28)):
        y = (torch.randn(shape, generator=generator) * 3 + 1).contiguous(memory_format=memory_format).requires_grad_()
        gamma, beta, error = torch.randn(3, shape[1], generator=generator)
        gamma.requires_grad_(), beta.requires_grad_()
        if last and y.is_contiguous():  # one pixel: both layouts are one
            continue
        quantizer = FakeQuantize(QSpec(), MovingAverageMinMaxObserver(QSpec()))
        moved = Moved(
            Statistics(torch.zeros(shape[1]), torch.ones(shape[1]), 0.1, 1e-5),
            None,
            quantizer.scale,
            quantizer.zero_point,
            quantizer.observer.state(),
        )
        follow = functools.partial(normalize_clip_quantize, moved=moved, code=code)
        out = normalized(y, gamma, beta, error, None, lambda *given, follow=follow: follow(*given[:4]))
        mean, inverse = out.grad_fn.saved_tensors[1:3]  # type: ignore[union-attr]
        given = torch.randn(shape, generator=generator)
        out.backward(given)

        with torch.no_grad():
            wide = (1, -1, 1, 1)
            factor = inverse * gamma
            constant = torch.addcmul(beta + error, -mean, factor)
            v = torch.addcmul(constant.view(wide), y, factor.view(wide))
            a = v.relu()
            reference = FakeQuantize(QSpec(), MovingAverageMinMaxObserver(QSpec()))
            wanted = reference.train()(a)
            grid = reference.snapshot()
            inside = inside_range(a, grid) & (v > 0)
        assert torch.equal(quantizer.scale, reference.scale) and torch.equal(quantizer.zero_point, reference.zero_point)
        assert torch.equal(quantizer.observer.min_val, reference.observer.min_val)
        assert torch.equal(quantizer.observer.max_val, reference.observer.max_val)
        different += int((out.detach() != wanted).sum())
        different += int((wanted != fake_quantize(a, grid)).sum())
        values += out.numel()
        masked += int((~inside).sum())
        # β's gradient is the sum of the mask's choice: float64 of the same values.
        total = (given * inside).double().sum((0, 2, 3))
        assert beta.grad is not None
        torch.testing.assert_close(beta.grad.double(), total, rtol=1e-5, atol=1e-4)
    assert values > 150_000 and masked > 10_000
    assert different == 0


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_statistics_and_gradients_are_those_of_batch_norm(memory_format: torch.memory_format) -> None:
    """Against PyTorch in float64, where nothing is rounded away, for data whose mean is large beside its deviation."""
    last = memory_format is torch.channels_last
    code = generated_code(last, 0.1, 1e-5, -math.inf, math.inf, QSpec(bits=16), None, "cpu")
    assert code.ready()
    generator = torch.Generator().manual_seed(3)
    y = (torch.randn(6, 10, 30, 30, generator=generator) + 300).contiguous(memory_format=memory_format)
    gamma, beta = torch.rand(10, generator=generator) + 0.5, torch.randn(10, generator=generator)
    ours, theirs = y.clone().requires_grad_(), y.double().requires_grad_()
    bn = nn.BatchNorm2d(10).double()
    with torch.no_grad():
        bn.weight.copy_(gamma), bn.bias.copy_(beta)
    running = torch.zeros(10), torch.ones(10)
    grid = torch.tensor(4e-4), torch.tensor(0, dtype=torch.int32)
    moved = Moved(Statistics(*running, 0.1, 1e-5), None, *grid, ())
    parameters = gamma.clone().requires_grad_(), beta.clone().requires_grad_()
    given = torch.randn(y.shape, generator=generator)
    follow = functools.partial(normalize_clip_quantize, moved=moved, code=code)
    out = normalized(ours, *parameters, None, None, lambda *given: follow(*given[:4]))
    wanted = bn(theirs)
    out.backward(given)
    wanted.backward(given.double())
    assert (out - wanted).abs().max() < 4e-4  # half a step, and float32's own error at 300
    torch.testing.assert_close(running[0].double(), bn.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(running[1].double(), bn.running_var, rtol=1e-4, atol=0)
    for mine, their in zip((ours, *parameters), (theirs, bn.weight, bn.bias), strict=True):
        assert mine.grad is not None and their.grad is not None
        torch.testing.assert_close(mine.grad.double(), their.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_training_is_that_of_the_plain_path(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(network()).to(memory_format=memory_format)  # type: ignore[call-overload]
    images = batches(memory_format)
    plain, expected = trained(model, images)
    calls = generated_calls(monkeypatch)
    fast, found = trained(model.apply(qbench.enable_fast_path), images)
    assert calls == ["generated"] * 3 * 3 * 3  # in each step of each layer: parameters, forward, backward
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().mean() < 1e-2 * theirs.abs().mean()
    ours, theirs = fast.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, theirs[name], rtol=2e-2, atol=2e-3)


def test_sums_are_bit_equal_to_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.conv(x))

    torch.manual_seed(0)
    model = prepared(Residual())
    plain, expected = trained(model, batches())
    calls = generated_calls(monkeypatch)
    fast, found = trained(model.apply(qbench.enable_fast_path), batches())
    assert calls == ["generated"] * 3 * 3  # in each step: weight and bias, the output of the convolution, the sum
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), fast.state_dict().values(), strict=True))


def test_weights_and_bias_errors_are_those_of_the_plain_path() -> None:
    model, _ = trained(prepared(network()), batches())
    layers = [m for m in model.modules() if isinstance(m, QatLayer)]
    with torch.no_grad():
        layers[0].bn.weight[2] = 0.0
        layers[1].bn.bias[3] = 1e6  # beyond what the bias holds: the floor coarsens the weights
    for layer in layers:
        plain = layer._training_parameters()
        layer.apply(qbench.enable_fast_path)
        fast = layer._training_parameters()
        assert torch.equal(plain.weight, fast.weight)
        assert plain.error is not None and fast.error is not None and torch.equal(plain.error, fast.error)
        assert plain.qparams is not None and fast.qparams is not None
        assert torch.equal(plain.qparams.scale, fast.qparams.scale)
        silenced = torch.zeros_like(plain.error, dtype=torch.bool) if plain.silenced is None else plain.silenced
        assert fast.silenced is not None and torch.equal(silenced, fast.silenced)


def test_what_was_trained_is_what_is_converted() -> None:
    model, _ = trained(prepared(network()).apply(qbench.enable_fast_path), batches())
    model.eval()
    x = batches()[0]
    program = qbench.convert(model, example_inputs=(x,))
    assert int((model(x) != program.module()(x)).sum()) == 0


def test_models_are_copied_and_stored_with_the_switch() -> None:
    model, _ = trained(prepared(network()).apply(qbench.enable_fast_path), batches(count=1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = [m for m in other.modules() if isinstance(m, QatLayer)]
        assert all(layer.fast_path for layer in layers)
        other(batches()[0])
        other.apply(qbench.disable_fast_path)
        assert not any(layer.fast_path for layer in layers)


def test_gradients_are_the_same_with_low_memory() -> None:
    model = prepared(network()).apply(qbench.enable_fast_path)
    plain, first = trained(model, batches())
    low, second = trained(model.apply(qbench.enable_low_memory), batches())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), low.state_dict().values(), strict=True))


class TestWithoutACompiler:
    @pytest.fixture(autouse=True)
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A compiler that fails, in a process that has not compiled anything."""

        def compile(*args: object, **kwargs: object) -> object:
            def call(*tensors: Tensor) -> object:
                raise RuntimeError("no working C++ compiler: g++")

            return call

        def fresh(function: object, sample: object, *constants: object) -> Generated:
            return made.setdefault((function, constants), Generated(function, constants, sample))  # type: ignore[arg-type]

        made: dict[object, Generated] = {}
        monkeypatch.setattr(torch, "compile", compile)
        monkeypatch.setattr(generated_module, "_refused", [])
        for module in (generated_epilogue, generated_rounding, fast_parameters):
            monkeypatch.setattr(module, "generated", fresh)
        for cached in (generated_epilogue.generated_code, generated_rounding.clip_code):
            monkeypatch.setattr(epilogue_module, cached.__name__, functools.lru_cache(cached.__wrapped__))

    def test_the_plain_path_goes_on_with_one_line_in_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        model = prepared(network())
        plain, expected = trained(model, batches())
        with caplog.at_level(logging.INFO, "qbench"):
            fast, found = trained(model.apply(qbench.enable_fast_path), batches())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for ours, theirs in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
        lines = [record.message for record in caplog.records]
        assert len(lines) == 1
        assert "no working C++ compiler" in lines[0] and "plain path" in lines[0]


def _twice(x: Tensor | None, factor: float) -> tuple[Tensor]:
    assert x is not None
    return (x * factor,)


def _ones(factor: float) -> list[Tensor | None]:
    return [torch.ones(3)]


class TestGenerated:
    def test_an_error_of_the_compiler_in_the_middle_of_training_is_caught(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        sizes: list[int] = []

        def compile(function: object, **kwargs: object) -> object:
            def call(x: Tensor) -> object:
                sizes.append(len(x))
                if len(x) == 5:
                    raise RuntimeError("disk full")
                return function(x)  # type: ignore[operator]

            return call

        monkeypatch.setattr(torch, "compile", compile)
        code = Generated(_twice, (2.0,), _ones)
        assert code.ready() and not code.failed
        for size in (4, 5, 6):
            assert torch.equal(code(torch.ones(size))[0], torch.full((size,), 2.0))  # type: ignore[arg-type]
        assert sizes == [3, 4, 5]
        assert "disk full" in code.failed and not code.ready()
        assert [record.message.count("disk full") for record in caplog.records] == [1]

    def test_arguments_that_are_known_do_not_go_through_dynamo_again(self) -> None:
        code = Generated(_twice, (2.0,), _ones)
        assert code.ready()
        code(torch.ones(4))

        def not_again(*tensors: object) -> object:
            raise RuntimeError("it was asked again")

        code._compiled = not_again  # type: ignore[assignment]
        for size in (4, 5):
            assert torch.equal(code(torch.full((size,), 3.0))[0], torch.full((size,), 6.0)) and not code.failed  # type: ignore[arg-type]
        for other in (torch.ones(5, 1), torch.ones(4, dtype=torch.float64), torch.ones(8)[::2]):
            code.failed = ""
            assert torch.equal(code(other)[0], 2 * other) and "asked again" in code.failed  # type: ignore[arg-type]

    def test_other_bits_than_those_of_eager_operators_are_not_taken(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def compile(function: object, **kwargs: object) -> object:
            return lambda x: (x * 2.0000002,)

        monkeypatch.setattr(torch, "compile", compile)
        code = Generated(_twice, (2.0,), _ones)
        assert not code.ready() and "other bits" in code.failed
        assert torch.equal(code(torch.ones(2))[0], torch.full((2,), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.bn, "momentum", None),
        lambda layer: layer.output_quantizer.observer.register_forward_hook(lambda *_: None),
        lambda layer: layer.double(),
    ],
    ids=["cumulative average", "watched", "float64"],
)
def test_what_it_cannot_serve_takes_the_plain_path(change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(network()).apply(qbench.enable_fast_path)
    layer = next(m for m in model.modules() if isinstance(m, QatLayer))
    change(layer)  # type: ignore[operator]
    calls = generated_calls(monkeypatch)
    dtype = layer.linear_weight.dtype
    assert torch.isfinite(layer(batches()[0].to(dtype))).all()
    assert len(calls) == (0 if dtype is torch.float64 else 1)  # the parameters alone


def test_sizes_of_one_get_code_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of 1 is a constant to the compiler: what is made for it must not be taken for other sizes, and back."""
    torch.manual_seed(0)
    calls = generated_calls(monkeypatch)
    for kernel, inputs, pixels in ((3, 4, 9), (1, 1, 9), (3, 4, 3), (1, 1, 1), (1, 4, 9), (3, 2, 9)):
        x = torch.randn(6, inputs, pixels, pixels)
        model = nn.Sequential(nn.Conv2d(inputs, 6, kernel, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        model = qbench.prepare_qat(qbench.fuse(model), qconfig=qbench.get_qconfig(), example_inputs=(x,)).train()
        fast = copy.deepcopy(model).apply(qbench.enable_fast_path)
        assert (model(x) - fast(x)).abs().max() <= model[0].output_quantizer.scale * 1.01  # a code at most
    assert set(calls) == {"generated"}


def test_an_output_may_be_written_to() -> None:
    model = prepared(network()).apply(qbench.enable_fast_path)
    y = model(batches()[0])
    torch.relu_(y).sum().backward()


def test_scales_that_learn_keep_their_gradient() -> None:
    model = qbench.fuse(network())
    images = (torch.randn(2, 3, 12, 12),)
    model = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(method="lsq"), example_inputs=images).train()
    model(images[0])
    plain, fast = copy.deepcopy(model), copy.deepcopy(model).apply(qbench.enable_fast_path)
    for one in (plain, fast):
        one(images[0]).square().mean().backward()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)  # sums, in another order


def test_the_bias_error_hands_its_gradient_on() -> None:
    """Where the input's scale learns, `e` carries a gradient to it through layers whose own quantizers do not learn."""
    images = (torch.randn(2, 3, 12, 12),)
    model = qbench.fuse(network())
    model = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=images).train()
    model(images[0])
    layer = next(m for m in model.modules() if isinstance(m, QatLayer))
    plain = copy.deepcopy(layer)
    gradients = []
    for one in (plain, copy.deepcopy(layer).apply(qbench.enable_fast_path)):
        parameters = one._training_parameters()
        assert parameters.error is not None
        error = parameters.error.clone().requires_grad_()
        one.convolution = lambda: None  # parameters and convolution are functions of their own
        one._training_parameters = lambda found=parameters, e=error: found._replace(error=e)
        one(images[0]).square().sum().backward()
        assert one.path == ("generated" if one.fast_path else "fused") and error.grad is not None
        gradients.append(error.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_the_paths_are_reported() -> None:
    model = prepared(network())
    assert "3 not called yet, or compiled with the model" in str(qbench.training_paths(model))
    model(batches()[0])
    assert str(qbench.training_paths(model)) == "training path of 3 layers: 3 one function in blocks"
    model.apply(qbench.enable_fast_path)
    model.get_submodule("3").output_quantizer.register_forward_hook(lambda *_: None)  # type: ignore[operator, union-attr]
    model(batches()[0])
    paths = qbench.training_paths(model)
    assert set(paths.layers.values()) == {"generated", "steps"}
    assert "2 generated code, 1 step by step" in str(paths)


class Learning(nn.Module):
    """A BatchNorm before an activation that clips, one before none, a sum, and a layer without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(torch.relu(x + self.second(x)))
        return out


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "pact", "tqt"])
def test_learned_grids_have_the_codes_and_gradients_of_the_steps(
    method: str, memory_format: torch.memory_format
) -> None:
    assert paths_of_learned_grids(method, memory_format) == {"generated"}


def paths_of_learned_grids(method: str, memory_format: torch.memory_format) -> set[str]:
    """The paths of a model whose codes and gradients, on the fast path, are those of the steps."""
    torch.manual_seed(0)
    qconfig = qbench.get_qconfig(method=method)
    model = qbench.prepare_qat(qbench.fuse(Learning()), qconfig=qconfig, example_inputs=(torch.randn(2, 3, 12, 12),))
    model = model.train().to(memory_format=memory_format)  # type: ignore[call-overload]
    x = batches(memory_format, count=1)[0]
    model(x).square().mean().backward()
    activations = [q for q in model.modules() if isinstance(q, LearnedFakeQuantize) and q.change.ndim == 0]
    with torch.no_grad():
        for quantizer in activations:  # so that many values are clipped
            quantizer.change.sub_(0.6 if method == "tqt" else 0.4 * quantizer.start)
    found, paths = [], set()
    for fast in (False, True):
        one = copy.deepcopy(model)
        for quantizer in one.modules():
            if isinstance(quantizer, LearnedFakeQuantize):
                quantizer.learning = True
        if fast:
            one.apply(qbench.enable_fast_path)
        one.zero_grad()
        y = one(x)
        (3.0 * y.square().mean()).backward()
        paths = set(qbench.training_paths(one).layers.values())
        assert fast or paths == {"steps"}
        found.append((y.detach(), dict(one.named_parameters())))
    (plain, expected), (fast_output, ours) = found
    assert int((plain != fast_output).sum()) == 0 and len(plain.unique()) > 30
    for name, parameter in expected.items():
        mine, theirs = ours[name].grad, parameter.grad
        assert mine is not None and theirs is not None, name
        assert (mine - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-7, name
    moved = [q.change.grad for q in activations]
    assert len(moved) >= 4 and all(grad is not None and grad != 0 for grad in moved)
    return paths


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of its own doing
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_model_is_compiled_once() -> None:
    torch.compiler.reset()
    model = prepared(network()).apply(qbench.enable_fast_path)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in batches():
            compiled(x).sum().backward()
