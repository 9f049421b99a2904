"""The quantizer of a bias: its grid follows from its neighbours, so it observes nothing.

    input_weight   s_b = f32(s_in · s_w)                 (out,)    what integer hardware adds to its accumulator
    own            s_b = max|b| / code_limit(bits)       ()        hardware with a scale of its own for the bias
    own_pow2       the next power of two of that         ()
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from qbench.errors import ConfigError
from qbench.numerics import bias as numerics
from qbench.numerics.blocks import at_hand
from qbench.numerics.straight_through import fake_quantize_bias_ste

BIAS_SCALES = ("input_weight", "own", "own_pow2")

# Narrower than this at input·weight scale, the weight-scale floor would wipe out the weights.
NARROWEST_INPUT_WEIGHT_BITS = 16

SMALLEST_BIAS_SCALE = 2.0**-120

# From here on, and for codes up to this share of their limit, it is clear that the weight-scale floor lies below.
CLEAR_BIAS_SCALE, CLEAR_SHARE = 2.0 * SMALLEST_BIAS_SCALE, 0.99


@dataclasses.dataclass(frozen=True)
class BiasSpec:
    """What is wanted of a bias.

    Attributes:
        bits: Width of a code, 8 to 64.
        scale: `"input_weight"`, `"own"` or `"own_pow2"`.

    Raises:
        ConfigError: an unknown scale, a width outside 8…64, or fewer than 16 bits at input·weight scale.
    """

    bits: int = 32
    scale: str = "input_weight"

    def __post_init__(self) -> None:
        if self.scale not in BIAS_SCALES:
            raise ConfigError(f"bias scale {self.scale!r} is unknown; expected one of {', '.join(BIAS_SCALES)}")
        if not isinstance(self.bits, int) or not 8 <= self.bits <= 64:
            raise ConfigError(f"a bias of {self.bits!r} bits: expected 8 to 64")
        if self.scale == "input_weight" and self.bits < NARROWEST_INPUT_WEIGHT_BITS:
            raise ConfigError(
                f"a bias of {self.bits} bits at input·weight scale would force weight scales so coarse that the "
                "weights vanish; where the target has one, give it a scale of its own: "
                f"get_qconfig(bias_bits={self.bits}, bias_scale='own')"
            )

    @property
    def code_limit(self) -> int:
        """Largest |q_b|."""
        return numerics.code_limit(self.bits)

    @property
    def clear_limit(self) -> float:
        """Largest |q_b| that clearly fits, without a look at the weight-scale floor."""
        return CLEAR_SHARE * self.code_limit

    def __str__(self) -> str:
        return f"int{self.bits} at {self.scale} scale"


class BiasQuantizer(nn.Module):
    """Puts a folded bias on its grid; stateless.

    Args:
        spec: Width and scale rule.
    """

    def __init__(self, spec: BiasSpec) -> None:
        super().__init__()
        self.spec = spec

    def scale(self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """`s_b`, () or (out,), from the bias (out,), s_in () and s_w (out,)."""
        if self.spec.scale == "input_weight":
            return numerics.bias_scale(input_scale, weight_scale)
        return numerics.own_bias_scale(bias, self.spec.bits, power_of_two=self.spec.scale == "own_pow2")

    def weight_scale_floor(self, bias: Tensor, input_scale: Tensor) -> Tensor | None:
        """Smallest s_w per output channel at which the bias fits, (out,); None where s_w has no part in its scale.

        It also keeps `s_in · s_w` above 0.
        """
        if self.spec.scale != "input_weight":
            return None
        # The scales of a dead input and of a channel of zeros are so small that their product would be 0.
        usable = SMALLEST_BIAS_SCALE / input_scale.detach()
        return torch.maximum(numerics.weight_scale_floor(bias, input_scale, self.spec.bits), usable)

    def surely_fits(self, bias: Tensor, scale: Tensor) -> bool:
        """Whether the weight-scale floor lies clearly below every scale, so that it need not be computed.

        Only CPUs are asked, and not by compiled code: elsewhere the answer would have to be waited for.
        """
        if self.spec.scale != "input_weight":
            return True
        if not at_hand(scale):
            return False
        scale = scale.detach()
        lowest, highest = torch.aminmax(bias.detach() / scale)
        usable = scale.amin() >= CLEAR_BIAS_SCALE
        return bool(usable) and max(-float(lowest), float(highest)) <= self.spec.clear_limit

    def forward(self, bias: Tensor, scale: Tensor) -> Tensor:
        """`b̂`, (out,)."""
        return fake_quantize_bias_ste(bias, scale, self.spec.bits)

    def codes(self, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """int64 codes (out,) and the mask of those that saturated."""
        return numerics.bias_codes(bias, scale, self.spec.bits)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec})"
