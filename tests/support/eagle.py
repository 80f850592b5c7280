"""An EAGLE head done slowly: one path of one sequence from nothing, by the published formulas, in float64."""

import torch
from torch import Tensor

from gorgon_engine.heads.eagle import EagleHead, EagleShape

Weights = dict[str, Tensor]


def make_head(shape: EagleShape, *, seed: int = 0, std: float = 0.3) -> EagleHead:
    """Random weights, gains around 1."""
    torch.manual_seed(seed)
    head = EagleHead(shape)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm")), std=std)
    return head.requires_grad_(False)


def predict(head: EagleHead, features: Tensor, embeddings: Tensor) -> Tensor:
    """The features [J, C] that the head predicts behind true `features` [T, C], one after the other.

    embeddings [T + J - 1, C]: of the tokens behind the true features, the last J - 1 of them behind predicted ones.
    """
    weights = {name: parameter.detach().double() for name, parameter in head.named_parameters()}
    inputs = [_input(weights, one, other) for one, other in zip(features, embeddings[: len(features)], strict=True)]
    predicted = [_layer(head.shape, weights, inputs)]
    for embedding in embeddings[len(features) :]:
        inputs.append(_input(weights, predicted[-1], embedding))
        predicted.append(_layer(head.shape, weights, inputs))
    return torch.stack(predicted).float()


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-5) * gain


def _input(weights: Weights, feature: Tensor, embedding: Tensor) -> Tensor:
    feature, embedding = feature.double(), embedding.double()
    parts = [_norm(feature, weights["feature_norm"]), _norm(embedding, weights["embedding_norm"])]
    return weights["fc.weight"] @ torch.cat(parts)


def _turned(x: Tensor, position: int, theta: float) -> Tensor:
    """x [D]: RoPE, a pair at a time."""
    out, half = x.clone(), len(x) // 2
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / len(x)), dtype=torch.float64)
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def _layer(shape: EagleShape, weights: Weights, inputs: list[Tensor]) -> Tensor:
    """The layer's output [C] at the last of its inputs, which are at positions 0, 1, ..."""
    rows = [weights["qkv.weight"] @ _norm(x, weights["attention_norm"]) for x in inputs]
    heads = [row.view(sum(shape.head_counts), shape.head_dim) for row in rows]
    num_queries, num_groups, _ = shape.head_counts
    last, attended = len(inputs) - 1, []
    for query_head in range(num_queries):
        group = query_head // (num_queries // num_groups)
        query = _turned(heads[last][query_head], last, shape.rope_theta)
        keys = [_turned(row[num_queries + group], place, shape.rope_theta) for place, row in enumerate(heads)]
        scores = torch.stack([query @ key for key in keys]) * shape.head_dim**-0.5
        values = torch.stack([row[num_queries + num_groups + group] for row in heads])
        attended.append(torch.softmax(scores, dim=0) @ values)
    x = inputs[last] + weights["o.weight"] @ torch.cat(attended)
    gate, up = (weights["gate_up.weight"] @ _norm(x, weights["mlp_norm"])).chunk(2)
    return _norm(x + weights["down.weight"] @ (gate * torch.sigmoid(gate) * up), weights["norm"])
