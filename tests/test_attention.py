"""Attention written out: equal to the original in float, whole on the way to a program, and reported."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import assert_exact
from torch import Tensor, nn

import qbench
from qbench._torchvision import import_torchvision
from qbench.attention import EXPLICIT
from qbench.errors import FusionError, QBenchWarning
from qbench.nn.attention import (
    ExplicitAttention,
    ExplicitMultiheadAttention,
    ExplicitShiftedWindowAttention,
    ExplicitShiftedWindowAttentionV2,
    MaskedSoftmax,
)
from qbench.nn.attention.operations import LARGEST_LOGIT_SCALE

import_torchvision()
from torchvision.models import maxvit, swin_transformer, vision_transformer  # noqa: E402

# Float32 sums of at most 64 products of numbers around 1, in another order; measured: 2.4e-7 at most.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(autouse=True, params=[False])
def fastpath(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that ask for it run with the fused kernel of MultiheadAttention, too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


both_paths = pytest.mark.parametrize("fastpath", [False, True], indirect=True, ids=["plain", "fastpath"])


def random(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters that are not those of the initialisation: no zeros, no equal heads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def window(
    kind: type[nn.Module] = swin_transformer.ShiftedWindowAttention, shift: int = 2, **options: Any
) -> nn.Module:
    return random(kind(16, [4, 4], [shift, shift], 2, **options))


def maxvit_attention() -> nn.Module:
    return random(maxvit.RelativePositionalMultiHeadAttention(16, 8, 16))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "swin": (lambda: window(shift=0), (2, 8, 8, 16)),
    "swin shifted": (window, (2, 8, 12, 16)),
    "swin shifted along one axis": (
        lambda: random(swin_transformer.ShiftedWindowAttention(16, [4, 2], [0, 1], 4)),
        (2, 8, 8, 16),
    ),
    "swin padded": (window, (2, 7, 9, 16)),
    "swin in one window": (window, (2, 4, 4, 16)),
    "swin in one column of windows": (window, (2, 8, 3, 16)),
    "swin without biases": (lambda: window(qkv_bias=False, proj_bias=False), (2, 8, 8, 16)),
    "swin v2": (lambda: window(swin_transformer.ShiftedWindowAttentionV2), (2, 8, 8, 16)),
    "swin v2 padded": (lambda: window(swin_transformer.ShiftedWindowAttentionV2), (2, 5, 6, 16)),
    "swin v2 without biases": (
        lambda: window(swin_transformer.ShiftedWindowAttentionV2, qkv_bias=False),
        (2, 8, 8, 16),
    ),
    "maxvit": (maxvit_attention, (2, 3, 16, 16)),
}
modules = pytest.mark.parametrize("case", MODULES)


@modules
@pytest.mark.parametrize("training", [True, False])
def test_window_attention_equals_the_original(case: str, training: bool) -> None:
    make, shape = MODULES[case]
    original, x = make().train(training), draw(*shape)
    written = qbench.explicit_attention(original)
    assert isinstance(written, ExplicitAttention) and written.training is training
    torch.testing.assert_close(written(x), original(x), **CLOSE)
    assert all(module.training is training for module in written.modules())


@modules
def test_gradients_are_those_of_the_original(case: str) -> None:
    make, shape = MODULES[case]
    original = make()
    written = qbench.explicit_attention(original)
    grads = []
    for module in (original, written):
        x = draw(*shape).requires_grad_()
        (module(x) * draw(*shape, seed=3)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    packed = "to_qkv" if "maxvit" in case else "qkv"
    ours = torch.cat([part.weight.grad for part in (written.query, written.key, written.value)])
    # The factor is no part of the parameter, so a step of training is that of the original.
    torch.testing.assert_close(ours, getattr(original, packed).weight.grad, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is not None for parameter in written.parameters())


def test_a_mask_keeps_positions_apart_that_a_shift_brought_together() -> None:
    written = qbench.explicit_attention(window())
    seen: list[Tensor] = []
    written.softmax.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    written(draw(1, 8, 8, 16))
    # The last of four windows holds four corners of the image, of four positions each.
    assert seen[0].shape == (1, 4, 2, 16, 16)
    assert [int((seen[0][0, i, 0] > 1e-30).sum()) for i in range(4)] == [256, 128, 128, 64]


def test_the_factor_of_a_cosine_is_bounded() -> None:
    original = window(swin_transformer.ShiftedWindowAttentionV2)
    original.logit_scale.data.fill_(LARGEST_LOGIT_SCALE + 3)
    x = draw(2, 8, 8, 16)
    # Logits are 100 times a cosine, and so is their rounding.
    torch.testing.assert_close(qbench.explicit_attention(original)(x), original(x), rtol=1e-4, atol=5e-5)


# MultiheadAttention.

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without biases": {"bias": False},
    "other sizes": {"kdim": 12, "vdim": 20},
    "other sizes, batch first": {"kdim": 12, "vdim": 20, "batch_first": True, "bias": False},
    "one other size": {"vdim": 20},
}


def called(options: dict[str, Any], batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Query (5 positions), key and value (7) of a batch of 3."""
    sizes = (16, options.get("kdim", 16), options.get("vdim", 16))
    shapes = zip((5, 7, 7), sizes, strict=True)
    made = [draw(*((3,) if batched else ()), rows, size, seed=size) for rows, size in shapes]
    q, k, v = made if options.get("batch_first") or not batched else [x.transpose(0, 1) for x in made]
    return q, k, v


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one"])
@pytest.mark.parametrize(("need", "average"), [(False, True), (True, True), (True, False)])
def test_multihead_attention_equals_the_original(case: str, batched: bool, need: bool, average: bool) -> None:
    original = random(nn.MultiheadAttention(16, 2, **OPTIONS[case]))
    written = qbench.explicit_attention(original)
    inputs = called(OPTIONS[case], batched)
    options = {"need_weights": need, "average_attn_weights": average}
    for one, other in itertools.zip_longest(written(*inputs, **options), original(*inputs, **options)):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **CLOSE)


@both_paths
@pytest.mark.parametrize("heads", [2, 4, 1])
def test_self_attention_equals_the_fused_kernel(heads: int) -> None:
    original = random(nn.MultiheadAttention(16, heads, batch_first=True)).eval()
    x = draw(3, 7, 16)
    with torch.no_grad():
        expected = original(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(qbench.explicit_attention(original)(x, x, x)[0], expected, **CLOSE)


MASKS: dict[str, dict[str, Tensor]] = {
    "of truths": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(3)},
    "of numbers": {"attn_mask": draw(5, 7)},
    "for each head": {"attn_mask": draw(6, 5, 7)},
    "of padding": {"key_padding_mask": torch.arange(21).reshape(3, 7) % 7 > 4},
    "both": {"attn_mask": draw(6, 5, 7) > 1.5, "key_padding_mask": torch.arange(21).reshape(3, 7) % 7 > 5},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(7)[:5], "is_causal": True},
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("need", [True, False])
def test_masks_are_those_of_the_original(case: str, need: bool) -> None:
    original = random(nn.MultiheadAttention(16, 2, batch_first=True))
    inputs, masks = called({"batch_first": True}), dict(MASKS[case])
    expected = original(*inputs, need_weights=need, **{**masks, "is_causal": False})[0]
    found = qbench.explicit_attention(original)(*inputs, need_weights=need, **masks)[0]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_mask_of_one_sequence() -> None:
    original = random(nn.MultiheadAttention(16, 2))
    inputs, padding = called({}, batched=False), torch.arange(7) > 4
    expected = original(*inputs, key_padding_mask=padding)[0]
    found = qbench.explicit_attention(original)(*inputs, key_padding_mask=padding)[0]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_hint_without_its_mask_is_refused() -> None:
    written = qbench.explicit_attention(nn.MultiheadAttention(16, 2))
    with pytest.raises(FusionError, match="generate_square_subsequent_mask"):
        written(*called({}), is_causal=True)


def test_dropout_draws_what_the_original_draws_and_ends_with_training() -> None:
    original = random(nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True))
    written, inputs = qbench.explicit_attention(original), called({"batch_first": True})
    outputs = []
    for module in (original, written):
        torch.manual_seed(3)
        outputs.append(module(*inputs)[0])
    torch.testing.assert_close(*outputs, **CLOSE)
    assert not torch.allclose(written(*inputs)[0], outputs[1])
    written.eval(), original.eval()
    torch.testing.assert_close(written(*inputs)[0], original(*inputs)[0], **CLOSE)
    assert torch.equal(written(*inputs)[0], written(*inputs)[0])


def test_both_dropouts_of_a_window() -> None:
    written = qbench.explicit_attention(window(attention_dropout=0.25, dropout=0.5))
    assert (written.dropout.p, written.output_dropout.p) == (0.25, 0.5)
    x = draw(2, 8, 8, 16)
    assert float((written.train()(x) == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert int((written.eval()(x) == 0).sum()) == 0


@both_paths
@pytest.mark.parametrize("training", [True, False])
def test_layers_of_torch_run_with_it(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    original = random(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train(training)
    written = qbench.explicit_attention(original)
    assert len(qbench.attention_report(written).replaced) == 2
    x = draw(3, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(written(x), original(x), rtol=1e-5, atol=1e-5)


# What is replaced, and what is left.


class Own(nn.MultiheadAttention):
    """Computes something else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)[0] * 2


class MultiheadAttention(nn.Module):
    """Another one of the name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "keys of its own": (lambda: nn.MultiheadAttention(16, 2, add_bias_kv=True), "add_bias_kv=True"),
    "zeros": (lambda: nn.MultiheadAttention(16, 2, add_zero_attn=True), "add_zero_attn=True"),
    "derived": (lambda: Own(16, 2), "derives from MultiheadAttention"),
    "namesake": (MultiheadAttention, r"its submodules are \['qkv'\]"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_written_out_is_left_and_named(case: str) -> None:
    make, reason = LEFT[case]
    model = nn.Sequential(nn.Linear(16, 16), make())
    with pytest.warns(QBenchWarning, match=f"leaves 1 attention.*{reason}"):
        written = qbench.explicit_attention(model)
    report = qbench.attention_report(written)
    assert [found.path for found in report.left] == ["1"] and report.replaced == ()
    assert type(written[1]) is type(model[1]) and written[1] is not model[1]
    assert "left as it is: 1 [" in str(report)


def test_known_classes_are_told_apart_by_name() -> None:
    names = [kind.stands_for for kind in EXPLICIT]
    assert len(set(names)) == len(names) == 4
    assert type(qbench.explicit_attention(window())) is ExplicitShiftedWindowAttention
    v2 = qbench.explicit_attention(window(swin_transformer.ShiftedWindowAttentionV2))
    assert type(v2) is ExplicitShiftedWindowAttentionV2
    assert v2.key.bias is None and v2.query.bias is not None


def test_the_model_is_copied_or_changed_as_asked() -> None:
    shared = nn.MultiheadAttention(16, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    kept = copy.deepcopy(model.state_dict())
    written = qbench.explicit_attention(model)
    assert type(model["a"]) is nn.MultiheadAttention and model.state_dict().keys() == kept.keys()
    assert written["a"] is written["b"][0] and isinstance(written["a"], ExplicitMultiheadAttention)
    assert qbench.explicit_attention(model, inplace=True) is model
    assert isinstance(model["a"], ExplicitMultiheadAttention)
    assert len(qbench.attention_report(model).replaced) == 1
    again = qbench.explicit_attention(model)
    assert qbench.attention_report(again).replaced == () and type(again["a"]) is ExplicitMultiheadAttention


def test_hooks_qconfig_dtype_and_what_does_not_train_are_kept() -> None:
    calls: list[str] = []
    original = nn.MultiheadAttention(16, 2, dtype=torch.float64)
    original.register_forward_pre_hook(lambda module, args: calls.append("before"))
    original.register_forward_hook(lambda module, args, out: calls.append("after"))
    original.in_proj_weight.requires_grad_(False)
    original.qconfig = qbench.get_qconfig(activation_bits=6)
    written = qbench.explicit_attention(original)
    written(*(x.double() for x in called({})))
    assert calls == ["before", "after"] and written.qconfig == original.qconfig
    assert {parameter.dtype for parameter in written.parameters()} == {torch.float64}
    trained = {name for name, parameter in written.named_parameters() if parameter.requires_grad}
    assert trained == {"project.weight", "project.bias"}


def test_wrong_arguments() -> None:
    with pytest.raises(FusionError, match=r"explicit_attention: got str, expected a torch\.nn\.Module"):
        qbench.explicit_attention("vit")
    with pytest.raises(FusionError, match=r"attention_report\(qbench\.explicit_attention\(model\)\) works"):
        qbench.attention_report(nn.Linear(2, 2))


@modules
def test_state_copies_and_files(case: str) -> None:
    make, shape = MODULES[case]
    written, x = qbench.explicit_attention(make()).eval(), draw(*shape)
    expected = written(x)
    for twin in (copy.deepcopy(written), pickle.loads(pickle.dumps(written))):
        assert torch.equal(twin(x), expected)
    fresh = qbench.explicit_attention(random(make(), seed=9)).eval()
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(written.state_dict())
    assert torch.equal(fresh(x), expected)


# The whole way.


def small_vit() -> nn.Module:
    return vision_transformer.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=6, attention_dropout=0.1)


def small_swin(**options: Any) -> nn.Module:
    sizes = ([2, 2], 16, [2], [2], [4, 4])
    return swin_transformer.SwinTransformer(*sizes, num_classes=6, stochastic_depth_prob=0.0, **options)


def small_swin_v2() -> nn.Module:
    return small_swin(block=swin_transformer.SwinTransformerBlockV2)


class SmallMaxVit(nn.Module):
    """One layer of attention in windows and one in a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        options = (4, nn.GELU, nn.LayerNorm, 0.0, 0.0, 0.0)
        self.window = maxvit.PartitionAttentionLayer(16, 8, 4, "window", (8, 8), *options)
        self.grid = maxvit.PartitionAttentionLayer(16, 8, 4, "grid", (8, 8), *options)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grid(self.window(self.stem(x))).mean((2, 3)))


#: Of each model: how to make it, its input, classes of which it must hold so many, inputs that are quantized late.
WHOLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int], int]] = {
    "vit": (small_vit, (2, 3, 16, 16), {"ScaledLinear": 1, "MatMul": 2, "MaskedSoftmax": 1}, 3),
    "swin": (small_swin, (2, 3, 14, 14), {"ScaledLinear": 2, "MatMul": 4, "RelativePositionBias": 2}, 1),
    "swin v2": (small_swin_v2, (2, 3, 14, 14), {"CosineProduct": 2, "Normalize": 4, "ContinuousPositionBias": 2}, 1),
    "maxvit": (SmallMaxVit, (2, 3, 8, 8), {"ScaledLinear": 2, "MaskedSoftmax": 2, "RelativePositionBias": 2}, 1),
}
whole = pytest.mark.parametrize("case", WHOLE)
some = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ("vit", "swin v2") else pytest.mark.slow) for case in WHOLE]
)


def trained(make: Callable[[], nn.Module], x: Tensor, steps: int = 3) -> nn.Module:
    """Prepared, and trained a little."""
    model = qbench.fuse(qbench.explicit_attention(random(make()).eval()), example_inputs=(x,))
    model = qbench.prepare_qat(model.train(), qconfig=qbench.get_qconfig(), example_inputs=(x,))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(len(x))).backward()
        optimizer.step()
    return model.eval()


@whole
def test_every_operation_of_the_model_is_quantized(case: str) -> None:
    make, shape, classes, late = WHOLE[case]
    found = qbench.quantization_coverage(trained(make, draw(*shape), steps=0))
    assert (found.left_in_float, found.float_operations, found.unreached) == ((), (), ())
    assert found.quantized_layers == found.layers
    assert len(found.float_inputs) == late  # the image; of a ViT its class token and the embedding of positions, too
    assert found.linked_layers == found.layers - 1
    assert {name: found.quantized.get(name) for name in classes} == classes


@some
def test_what_is_trained_is_what_is_deployed(case: str) -> None:
    make, shape, _, _ = WHOLE[case]
    x = draw(*shape)
    model = trained(make, x)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    program = qbench.convert(model, (x,))
    assert_exact(model, program, draw(*shape, seed=5))
    # A bias of positions is stored as its codes: neither the table nor the network that made it is deployed.
    assert not [key for key in program.state_dict if "table" in key or "hidden" in key or "coords" in key]


@some
def test_prepared_models_survive_files_and_copies(case: str) -> None:
    make, shape, _, _ = WHOLE[case]
    x = draw(*shape)
    model = trained(make, x, steps=1)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = trained(make, x, steps=2)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x), expected)


def test_a_mask_costs_the_logits_no_code() -> None:
    x = draw(2, 3, 14, 14)
    model = trained(small_swin, x)
    masked = [m for m in model.modules() if isinstance(m, MaskedSoftmax)][1]
    source = masked.sources[0]
    assert len(masked.sources) == 1  # the mask lies on no grid
    assert float(source.scale) * 255 < 20  # with −100 on it the grid would be that wide


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qbench.errors.QBenchWarning")
@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "swin_v2_t", "maxvit_t"])
def test_torchvision_models_go_the_whole_way(name: str) -> None:
    model = import_torchvision().models.get_model(name, weights=None).eval()
    head = model.heads.head if name == "vit_b_16" else list(model.modules())[-1]
    nn.init.normal_(head.weight, std=0.05)  # of a ViT it is initialised with zeros
    x = draw(1, 3, 224, 224)
    written = qbench.explicit_attention(model)
    assert qbench.attention_report(written).left == ()
    with torch.no_grad():
        expected = model(x)
        assert (written(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    del model
    written = qbench.prepare_qat(
        qbench.fuse(written.train()), qconfig=qbench.get_qconfig(), example_inputs=(x,), inplace=True
    )
    found = qbench.quantization_coverage(written)
    assert (found.left_in_float, found.float_operations, found.unreached) == ((), (), ())
    assert found.linked_layers == found.layers - 1
    for _ in range(2):
        written.zero_grad()
        nn.functional.cross_entropy(written(x), torch.tensor([3])).backward()
        with torch.no_grad():
            for parameter in written.parameters():
                parameter -= 1e-3 * parameter.grad
    program = qbench.convert(written.eval(), (x,))
    assert_exact(written, program, x)
