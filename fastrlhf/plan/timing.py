"""Seconds of the parts of a run on GPUs, from operations, bytes and messages.

A rank's time is the sum of its matrix products, its passes over memory and its messages; nothing
overlaps but what the constants of `Hardware` allow for. The model of a training step follows
Narayanan et al. 2021 (arXiv 2104.04473, section 3) and Korthikanti et al. 2022 (arXiv 2205.05198);
docs/plan.md compares it with their tables. T is the tokens of a micro-batch, H the hidden size, t,
p and d the tensor-, pipeline- and data-parallel sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrlhf.config import ModelConfig
from fastrlhf.plan.hardware import Hardware
from fastrlhf.plan.layout import Layout

HALF, FULL = 2, 4
"""Bytes of a number in half and in single precision."""
_OPTIMIZER_BYTES = 34
"""Memory traffic of an Adam update per parameter: gradient, master weight and two moments in fp32,
read or written, and the weight."""
_SCORE_BYTES = 8
"""Traffic per attention score of an attention that stores its scores, forward pass."""

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer that decide its time."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    vocab: int
    """Columns of the LM head; 0 for a scalar head."""

    @classmethod
    def of(cls, model: ModelConfig, vocab: int) -> Shape:
        return cls(
            model.num_layers,
            model.hidden_size,
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            model.ffn_size,
            model.activation == "swiglu",
            vocab,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return projections + self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def weights(self) -> int:
        """Weights of all layers and of the LM head."""
        return self.layers * self.layer_weights + self.hidden * self.vocab


@dataclass(frozen=True)
class Timing:
    """Seconds of passes of a model of `shape` in `layout` on `gpu`."""

    shape: Shape
    layout: Layout
    gpu: Hardware
    flash: bool = True
    """Whether attention keeps its scores on the chip and skips those of later positions."""

    # ---- parts ----------------------------------------------------------------------------------

    def gemm(self, operations: float, width: float) -> float:
        """Return the seconds of matrix products whose narrow side is `width`."""
        gpu = self.gpu
        reached = gpu.gemm_efficiency * width / (width + gpu.gemm_half_width)
        return operations / (gpu.peak_tflops * 1e12 * reached)

    def passes(self, num_bytes: float) -> float:
        """Return the seconds in which kernels read and write `num_bytes`."""
        return num_bytes / (self.gpu.memory_gb_s * 1e9 * self.gpu.memory_efficiency)

    def tensor_link(self) -> float:
        """Return the bytes per second of a tensor-parallel collective."""
        gpu = self.gpu
        is_inside = self.layout.tensor <= gpu.gpus_per_node
        return (gpu.node_link_gb_s if is_inside else gpu.network_gb_s) * 1e9 * gpu.link_efficiency

    def outer_link(self) -> float:
        """Return the bytes per second between pipeline stages and data-parallel ranks."""
        gpu, layout = self.gpu, self.layout
        is_inside = layout.tensor * layout.pipeline * layout.data <= gpu.gpus_per_node
        return (gpu.node_link_gb_s if is_inside else gpu.network_gb_s) * 1e9 * gpu.link_efficiency

    # ---- a layer and a stage --------------------------------------------------------------------

    def attention(self, tokens: int, length: int) -> float:
        """Return the seconds of the forward pass of a layer's core attention."""
        shape, t = self.shape, self.layout.tensor
        width = shape.heads * shape.head_dim / t
        operations = 4 * tokens * length * width * (0.5 if self.flash else 1.0)
        seconds = operations / (self.gpu.peak_tflops * 1e12 * self.gpu.gemm_efficiency * 0.6)
        return seconds if self.flash else seconds + self._scores(tokens, length)

    def _scores(self, tokens: int, length: int) -> float:
        return self.passes(_SCORE_BYTES * self.shape.heads / self.layout.tensor * length * tokens)

    def layer(self, tokens: int, length: int, recompute: Recompute | None) -> float:
        """Return the seconds of a layer on T tokens in sequences of `length`.

        `recompute` None is the forward pass alone, otherwise forward and backward pass.
        """
        shape, layout = self.shape, self.layout
        t, h = layout.tensor, shape.hidden
        matrices = self.gemm(2 * tokens * shape.layer_weights / t, h / t)
        attention = self.attention(tokens, length)
        whole = 20 * h / (t if layout.sequence else 1)  # norms, residual sums
        split = 28 * h / t  # activation, heads
        elementwise = self.passes(tokens * (whole + split))
        messages = 2 * self._all_reduce(tokens * h * HALF)
        forward = matrices + attention + elementwise + messages
        if recompute is None:
            return forward
        backward = 2 * matrices + 2 * attention + 1.5 * elementwise + messages
        if recompute == "none":
            return forward + backward
        again = forward if recompute == "full" else 0.0 if self.flash else attention
        return forward + backward + again

    def _all_reduce(self, num_bytes: float) -> float:
        """Return the seconds of an all-reduce in a tensor-parallel group (or of its halves)."""
        t = self.layout.tensor
        if t == 1:
            return 0.0
        return 2 * (t - 1) / t * num_bytes / self.tensor_link() + self.gpu.collective_s

    def head(self, tokens: int, products: int) -> float:
        """Return the seconds of the LM head: 3 products in training, 1 for log-probs."""
        shape, t = self.shape, self.layout.tensor
        if shape.vocab == 0:
            return 0.0
        product = self.gemm(2 * tokens * shape.hidden * shape.vocab / t, shape.hidden / t)
        return products * product + self.passes(tokens * shape.vocab / t * 10)

    def hop(self, tokens: int) -> float:
        """Return the seconds of sending a micro-batch's hidden states to the next stage."""
        if self.layout.pipeline == 1:
            return 0.0
        num_bytes = tokens * self.shape.hidden * HALF / self.layout.tensor
        return num_bytes / self.outer_link() + self.gpu.collective_s

    # ---- passes over a batch --------------------------------------------------------------------

    @property
    def stage_layers(self) -> float:
        return self.shape.layers / self.layout.pipeline

    def bubble(self, micro_batches: int) -> float:
        """Return the share of a pipelined pass in which a stage waits."""
        idle = (self.layout.pipeline - 1) / self.layout.virtual
        return idle / (micro_batches + idle)

    def _pipelined(self, micro_batches: int, stage: float, head: float, hops: float) -> float:
        """Return the seconds of `micro_batches` through the pipeline; the last stage has `head`."""
        hops *= self.layout.virtual
        idle = (self.layout.pipeline - 1) / self.layout.virtual
        return micro_batches * (stage + head + hops) + idle * (stage + hops)

    def training(self, tokens: int, length: int, micro_batches: int, recompute: Recompute) -> float:
        """Return the seconds of the forward and backward passes of a rank's micro-batches."""
        stage = self.stage_layers * self.layer(tokens, length, recompute)
        hops = 2 * self.hop(tokens)
        return self._pipelined(micro_batches, stage, self.head(tokens, 3), hops)

    def scoring(self, tokens: int, length: int, micro_batches: int) -> float:
        """Return the seconds of forward passes with log-probs or scores."""
        stage = self.stage_layers * self.layer(tokens, length, None)
        return self._pipelined(micro_batches, stage, self.head(tokens, 1), self.hop(tokens))

    def optimizer(self, *, is_sharded: bool) -> float:
        """Return the seconds of the gradient reduction, Adam and the gathering of weights.

        Gradients are reduced in fp32. A plain all-reduce moves as much as a reduce-scatter and an
        all-gather.
        """
        layout, d = self.layout, self.layout.data
        own = self.shape.weights / (layout.tensor * layout.pipeline)
        updated = own / d if is_sharded else own
        gathered = HALF if is_sharded else FULL
        moved = own * (FULL + gathered) * (d - 1) / d
        return moved / self.outer_link() + self.passes(updated * _OPTIMIZER_BYTES)

    def decode_step(self, rows: int, length: float) -> float:
        """Return the seconds of one token for `rows` sequences of `length` tokens, all stages.

        Reads the weights and the cached keys and values once, and starts about 14 kernels a layer.
        With p stages the rows are p groups, and a step takes 2p - 1 times a stage's group.
        """
        shape, layout = self.shape, self.layout
        stages = layout.pipeline
        group = -(-rows // stages)
        layers, t = self.stage_layers, layout.tensor
        weights = layers * shape.layer_weights / t * HALF
        cached = layers * 2 * group * length * shape.kv_heads * shape.head_dim / t * HALF
        head = shape.hidden * shape.vocab / t * HALF / stages
        kernels = (14 * layers + 10) * self.gpu.launch_s
        products = self.gemm(2 * group * shape.layer_weights / t * layers, shape.hidden / t)
        messages = 2 * layers * self._all_reduce(group * shape.hidden * HALF)
        work = max(self.passes(weights + cached + head), products, kernels) + messages
        return (2 * stages - 1) * (work + self.hop(group))
