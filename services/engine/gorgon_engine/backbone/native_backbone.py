"""The forward pass on a CPU through the project's own kernels: one call for the whole model, row-invariant.

Padding rows are not computed: the kernels take a flat list of rows, each with its own slot, prefix and ancestors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gorgon_engine.backbone.base import ForwardInputs, ForwardOutput, LogitsFor, RowLogits
from gorgon_engine.kernels.cpu import Kind, NativeLayer, NativeModel, PackedLinear
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.loading import BackboneWeights, LayerWeights


class NativeBackbone:
    """A Llama-architecture model whose every row is computed in one fixed order of operations, whatever the batch:
    tree verification gives bit for bit what plain decoding gives."""

    device = torch.device("cpu")
    row_invariant = True

    def __init__(self, weights: BackboneWeights, *, kind: Kind) -> None:
        config = weights.config
        assert isinstance(weights.lm_head, PackedLinear)
        self.config: BackboneConfig = config
        self.kind: Kind = kind
        self.cache_dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        self.kernels = f"native-{kind}"
        self._rope = weights.rope
        self.embedding = weights.embedding
        self.lm_head = weights.lm_head
        self._model = NativeModel(
            [_native_layer(layer) for layer in weights.layers],
            weights.final_norm,
            weights.lm_head,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
        )

    def project(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden.float().contiguous())

    def project_to(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        linear = self.lm_head.select_outputs(tokens)
        return lambda hidden: linear(hidden.float().contiguous())

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens].float()

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs, cache: KVCache, *, logits_for: LogitsFor = LogitsFor.ALL) -> ForwardOutput:
        batch, num_rows = inputs.tokens.shape
        index = torch.arange(num_rows)
        real = index < inputs.num_rows[:, None]  # [B, N]
        whole = bool(real.all())

        def flat(values: Tensor) -> Tensor:
            values = values.expand(batch, num_rows, *values.shape[2:])
            return values.flatten(0, 1) if whole else values[real]

        lengths = inputs.lengths[:, None]
        cos, sin = self._rope.cos_sin(inputs.positions, inputs.prompt_lengths[:, None])
        written = lengths + index  # [B, N]
        if inputs.ancestors is None:
            prefix, ancestors = written + 1, torch.zeros((batch, num_rows, 1), dtype=torch.int64)
        else:
            prefix, ancestors = lengths.expand_as(written), inputs.ancestors
        tokens = flat(inputs.tokens)
        num_flat = tokens.shape[0]
        wanted = {LogitsFor.ALL: num_flat, LogitsFor.LAST: batch, LogitsFor.NONE: 0}[logits_for]
        logits_rows = None
        if logits_for is LogitsFor.LAST:
            logits_rows = (inputs.num_rows.cumsum(0) - 1).int()
        elif logits_for is LogitsFor.NONE:
            logits_rows = torch.empty(0, dtype=torch.int32)
        hidden = torch.empty((num_flat, self.config.hidden_size))
        logits = torch.empty((wanted, self.config.vocab_size))
        self._model.forward(
            embeddings=self.embedding[tokens].float(),
            cos=flat(cos).contiguous(),
            sin=flat(sin).contiguous(),
            slots=flat(inputs.slots[:, None]).int(),
            write_positions=flat(written).int(),
            prefix_lengths=flat(prefix).int(),
            tree_base=flat(lengths).int(),
            ancestors=flat(ancestors).contiguous(),
            keys=cache.keys,
            values=cache.values,
            logits_rows=logits_rows,
            out_hidden=hidden,
            out_logits=logits,
        )

        def padded(rows: Tensor) -> Tensor:
            if whole:
                return rows.view(batch, num_rows, -1)
            out = torch.zeros((batch, num_rows, rows.shape[1]))
            out[real] = rows
            return out

        ends = inputs.num_rows.cumsum(0)
        starts, width = {
            LogitsFor.ALL: (ends - inputs.num_rows, num_rows),
            LogitsFor.LAST: (torch.arange(batch), 1),
            LogitsFor.NONE: (torch.zeros_like(ends), 0),
        }[logits_for]
        return ForwardOutput(hidden=padded(hidden), row_logits=RowLogits(logits, starts, width))


def _native_layer(layer: LayerWeights) -> NativeLayer:
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    qkv, o, gate_up, down = (linear for linear in linears if isinstance(linear, PackedLinear))
    return NativeLayer(
        input_norm=layer.input_norm,
        post_norm=layer.post_norm,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        sliding_window=layer.sliding_window,
    )
