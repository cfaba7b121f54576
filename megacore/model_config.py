"""The configuration of a model: the function that is trained. A checkpoint carries it.

One Transformer serves all families; a family is a set of values of these keys. ``preset: NAME`` takes the values of
``megacore/presets/NAME.yaml``, and the other keys given change them.
"""

from __future__ import annotations

import re
from importlib.resources import files
from math import isqrt
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from typing_extensions import Self

from megacore.axes import AXES
from megacore.settings import Settings, parse_yaml

Architecture = Literal["encoder", "decoder", "encoder_decoder"]
Objective = Literal["mlm_nsp", "mlm", "causal_lm", "prefix_lm", "span_corruption"]
Stack = Literal["encoder", "decoder"]
# Bounds that no model reaches: a file that is damaged, or means harm, is refused before anything is made of its sizes.
Size = Annotated[int, Field(gt=0, le=1 << 31)]
OptionalSize = Annotated[int, Field(ge=0, le=1 << 31)]
Layers = Annotated[int, Field(gt=0, le=100_000)]
OptionalLayers = Annotated[int, Field(ge=0, le=100_000)]
Experts = Annotated[int, Field(gt=0, le=1 << 20)]
OptionalExperts = Annotated[int, Field(ge=0, le=1 << 20)]

BLOCK_NORM = re.compile(r"(encoder\.|decoder\.)?layers\.(\d+)\.(?:attention|cross_attention|mlp)_residual\.norm")
"""Names of the norms whose eps may differ."""

OBJECTIVES: dict[Architecture, tuple[Objective, ...]] = {
    "encoder": ("mlm_nsp", "mlm"),
    "decoder": ("causal_lm", "prefix_lm"),
    "encoder_decoder": ("span_corruption",),
}
"""What each architecture can be trained on; the first is its default."""


def divisors_near(number: int, value: int, most: int = 4) -> str:
    """Name the divisors of ``number`` nearest to ``value``, for error messages."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    divisors = {*small, *(number // d for d in small)}
    nearest = sorted(divisors, key=lambda d: (abs(d - value), d))[:most]
    return ", ".join(str(d) for d in sorted(nearest))


def token_head(objective: Objective) -> str:
    """Return the name by which an objective's token figures are known."""
    return "mlm" if objective.startswith("mlm") else "lm"


class ModelConfig(Settings):
    """The function that is trained; the defaults are BERT's."""

    preset: str | None = Field(None, exclude=True)
    architecture: Architecture = "encoder"
    objective: Objective = "mlm_nsp"
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_decoder_layers: OptionalLayers = 0
    """Of an encoder-decoder; 0 means as many as ``num_hidden_layers``."""
    num_attention_heads: Size
    num_key_value_heads: OptionalSize = 0
    """Grouped-query attention; 0 means as many as ``num_attention_heads``."""
    head_dim: OptionalSize = 0
    """0 means ``hidden_size / num_attention_heads``."""
    intermediate_size: Size
    position_embedding: Literal["learned", "rotary", "rotary_interleaved", "relative", "none"] = "learned"
    """``rotary`` turns the pairs (i, i + head_dim/2) as LLaMA does, ``rotary_interleaved`` (2i, 2i + 1) as RoFormer."""
    max_position_embeddings: Size = 512
    rope_theta: PositiveFloat = 10000.0
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    type_vocab_size: OptionalSize = 2
    """Segments; 0 for none."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: PositiveFloat = 1e-12
    norm_affine: bool = True
    """Gains (and the biases of ``layer_norm``)."""
    residual: Literal["post_norm", "pre_norm", "deep_norm", "sub_norm", "rezero"] = "post_norm"
    embedding_norm: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    gated_mlp: bool = False
    """Two input matrices, one activated: silu gives SwiGLU, gelu_tanh T5 v1.1's gated GELU."""
    attention_bias: bool = True
    """Biases of queries, keys and values."""
    linear_bias: bool = True
    """Biases of the attention's output and of the feed-forward network."""
    qk_norm: bool = False
    """RMS norm of each query and key head (Qwen3)."""
    attention_scale: NonNegativeFloat = 0.0
    """Factor of the attention scores; 0 means ``head_dim**-0.5`` (T5 uses 1)."""
    tie_word_embeddings: bool = True
    lm_transform: bool = True
    """Dense, activation and norm before the output table, as in BERT's MLM head."""
    lm_bias: bool = True
    """A bias per token in the output."""
    logit_multiplier: PositiveFloat = 1.0
    norm_copies: tuple[Size, ...] = ()
    """Of a stream that was widened unevenly: the sizes that it had. Norms then weigh the copies of each of the first
    one's coordinates as one (`megacore.nn.norm`); empty for plain norms."""
    norm_eps_of: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Norms of blocks, by name, whose eps is not ``norm_eps``: what a post-norm model needs after growing in depth."""
    stream_scales: dict[Stack, PositiveFloat] = Field(default_factory=dict)
    """DeepNorm's alpha of each stack, where it is not the formula's: a stack that grew keeps its own."""
    rope_frequencies: tuple[PositiveFloat, ...] = ()
    """Of each rotated pair, where they are not theta^(-2j/head_dim): heads that grew keep theirs."""
    num_experts: OptionalExperts = 0
    """Of each feed-forward network; 0 for a dense one."""
    num_experts_per_token: Experts = 2
    router_aux_loss_coefficient: NonNegativeFloat = 0.01
    hidden_dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    initialization: Literal["normal", "depth_scaled", "xavier", "roformer_v2"] = "normal"
    """``depth_scaled`` divides the matrices that write the stream by sqrt(2 × layers) (GPT-2); ``xavier`` is for
    DeepNorm; ``roformer_v2`` a truncated normal of variance 1/(fan-in × layers)."""
    initializer_range: PositiveFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """Take the preset, then write out what a value of 0, or none, stands for."""
        if not isinstance(values, dict):
            return values
        values = {**_preset(values.get("preset")), **values, "preset": None}
        architecture = values.get("architecture", "encoder")
        if architecture in OBJECTIVES:
            values.setdefault("objective", OBJECTIVES[architecture][0])
        heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
        if isinstance(heads, int) and heads > 0:
            values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
            if isinstance(hidden, int) and not values.get("head_dim") and hidden % heads == 0:
                values["head_dim"] = hidden // heads
        if architecture == "encoder_decoder":
            values["num_decoder_layers"] = values.get("num_decoder_layers") or values.get("num_hidden_layers")
        return values

    @property
    def key_value(self) -> int:
        """Keys and values are one parameter with a leading axis of two."""
        return 2

    @property
    def gate_up(self) -> int:
        """So are the two input matrices of a gated feed-forward network."""
        return 2

    @property
    def nsp_classes(self) -> int:
        """Index 0: the second segment follows the first; index 1: it is from another document."""
        return 2

    @property
    def scalar(self) -> int:
        """The axis of a parameter that is one number."""
        return 1

    @property
    def score_scale(self) -> float:
        """The factor of the attention scores."""
        return self.attention_scale or float(self.head_dim**-0.5)

    @property
    def norms_inputs(self) -> bool:
        """Whether sublayers normalise what they read, so that the stream needs a final norm."""
        return self.residual in ("pre_norm", "sub_norm")

    @property
    def has_output_gain(self) -> bool:
        """Whether a norm whose gain nothing else reads comes right before the output table."""
        return self.norm_affine and (self.lm_transform or (self.norms_inputs and self.objective != "mlm_nsp"))

    def layers_of(self, stack: Stack) -> int:
        """Return the number of layers of a stack."""
        decoder = self.num_decoder_layers if self.architecture == "encoder_decoder" else self.num_hidden_layers
        counts: dict[tuple[str, Stack], int] = {
            ("encoder", "encoder"): self.num_hidden_layers,
            ("encoder_decoder", "encoder"): self.num_hidden_layers,
            ("encoder_decoder", "decoder"): decoder,
            ("decoder", "decoder"): decoder,
        }
        return counts.get((self.architecture, stack), 0)

    def axis_size(self, name: str) -> int:
        """Return the size of the axis called ``name``."""
        size: int = getattr(self, AXES[name].key)
        return size

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        heads = self.num_attention_heads
        if not self.head_dim:
            raise ValueError(
                f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}; nearest that do: "
                f"{divisors_near(self.hidden_size, heads)} (or give head_dim)"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads={heads}; "
                f"nearest that do: {divisors_near(heads, self.num_key_value_heads)}"
            )
        if self.objective not in OBJECTIVES[self.architecture]:
            raise ValueError(
                f"objective={self.objective} does not fit architecture={self.architecture}, "
                f"which can be trained on: {', '.join(OBJECTIVES[self.architecture])}"
            )
        if self.position_embedding.startswith("rotary") and self.head_dim % 2:
            raise ValueError(
                f"position_embedding={self.position_embedding} turns pairs, but head_dim={self.head_dim} is odd"
            )
        if self.num_experts:
            self._check_experts()
        self._check_grown()
        if self.num_decoder_layers and self.architecture != "encoder_decoder":
            raise ValueError(f"num_decoder_layers={self.num_decoder_layers} needs architecture=encoder_decoder")
        return self

    def _check_grown(self) -> None:
        """Check what only a model that has grown has."""
        if self.norm_copies and list(self.norm_copies) != sorted({*self.norm_copies, self.hidden_size})[:-1]:
            raise ValueError(f"norm_copies={self.norm_copies}: sizes must grow, up to hidden_size={self.hidden_size}")
        if self.rope_frequencies and len(self.rope_frequencies) != self.head_dim // 2:
            raise ValueError(
                f"rope_frequencies has {len(self.rope_frequencies)} entries for the {self.head_dim // 2} pairs of "
                f"head_dim={self.head_dim}"
            )
        for name in self.norm_eps_of:
            found = BLOCK_NORM.fullmatch(name)
            decoder = self.architecture == "decoder" or (found is not None and found[1] == "decoder.")
            if not found or int(found[2]) >= self.layers_of("decoder" if decoder else "encoder"):
                raise ValueError(f"norm_eps_of: {name} is no norm of a block")

    def _check_experts(self) -> None:
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token} is more than num_experts={self.num_experts}"
            )
        if self.residual == "sub_norm":
            raise ValueError(
                f"residual=sub_norm has a norm inside the feed-forward network, which num_experts={self.num_experts} "
                "replaces; choose another residual, or num_experts=0"
            )


NOT_GROWN: dict[str, Any] = {"norm_copies": (), "norm_eps_of": {}, "stream_scales": {}, "rope_frequencies": ()}
"""The keys that only growth sets, as other models have them: other programs have no such thing."""


def presets() -> list[str]:
    """Name the presets."""
    folder = files("megacore") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _preset(name: Any) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in presets():
        raise ValueError(f"preset={name}: there is none of this name; there are: {', '.join(presets())}")
    values: dict[str, Any] = parse_yaml((files("megacore") / "presets" / f"{name}.yaml").read_text(encoding="utf-8"))
    return values
