"""What the host reads of a step is what the device held, to the bit."""

import torch

from gorgon_engine.transfer import Reading, pack, read_back, shapes_of

TENSORS = {
    "tokens": torch.tensor([[1, 2, 2**53 - 1], [4, 5, -1]]),
    "counts": torch.tensor([3, 0]),
    "probs": torch.tensor([[0.1, 1e-38], [float("-inf"), 2.0]]),
    "nothing": torch.zeros(2, 0),
    "wide": torch.arange(8).view(2, 2, 2),
}


def test_a_reading_is_exact() -> None:
    read = read_back(TENSORS)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor.double())


def test_padding_rows_can_be_left_out() -> None:
    read = Reading(pack(TENSORS), shapes_of(TENSORS)).wait(1)
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor[:1].double())
