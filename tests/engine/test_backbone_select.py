"""Which kernels serve a model on a GPU, and what is said where the project's own cannot: no GPU is needed to choose."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone, serve_weights, triton_refusal
from gorgon_engine.models.loading import BackboneWeights, Quantization, load_weights
from gorgon_protocol.errors import BadRequestError

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 61,
}
PLAN_MODULE = "gorgon_engine.kernels.triton.tree_attention_plan"
GLUON_MODULE = "gorgon_engine.kernels.triton.nf4_gluon"
GPU = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has: torch says that it is an H100."""
    be(monkeypatch, (9, 0))


def be(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(torch.version, "hip", None)


def weights_of(folder: Path, config: PreTrainedConfig | None = None, quantization: str = "nf4") -> BackboneWeights:
    AutoModelForCausalLM.from_config(config or LlamaConfig(**SHAPE)).save_pretrained(folder)
    return load_weights(folder, quantization=quantization, dtype=BF16)


@pytest.mark.parametrize(
    ("quantization", "capability", "dtype", "expected"),
    [
        ("nf4", (9, 0), BF16, "triton-nf4-gluon"),
        ("nf4", (9, 0), FP16, "triton-nf4"),
        ("nf4", (8, 9), BF16, "triton-nf4"),
        ("nf4", (10, 0), BF16, "triton-nf4"),
        ("none", (9, 0), BF16, "triton-bfloat16"),
        ("none", (8, 0), FP16, "triton-float16"),
    ],
)
@pytest.mark.parametrize("kernels", [Kernels.AUTO, Kernels.TRITON])
def test_the_name_says_which_kernels_run(
    quantization: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    expected: str,
    kernels: Kernels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be(monkeypatch, capability)
    weights = weights_of(tmp_path, quantization=quantization)
    backbone, notices = serve_weights(weights, device=GPU, dtype=dtype, kernels=kernels)
    assert (backbone.kernels, backbone.row_invariant, notices) == (expected, True, [])


def test_torch_serves_where_it_is_asked_to(tmp_path: Path) -> None:
    backbone, notices = serve_weights(weights_of(tmp_path), device=GPU, dtype=BF16, kernels=Kernels.TORCH)
    assert (backbone.kernels, backbone.row_invariant, notices) == ("torch-nf4", False, [])


def test_without_gluon_the_portable_kernel_serves_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, GLUON_MODULE, None)
    backbone, (notice,) = serve_weights(weights_of(tmp_path), device=GPU, dtype=BF16)
    assert backbone.kernels == "triton-nf4"
    assert "needs Triton 3.6" in notice
    assert "\n" not in notice


REFUSALS: dict[str, tuple[PreTrainedConfig | None, tuple[int, int], torch.dtype, str]] = {
    "old GPU": (None, (7, 5), BF16, "Some GPU has compute capability 7.5, they need 8.0"),
    "float32": (None, (9, 0), FP32, "they run bfloat16 and float16, not float32"),
    "head dim": (LlamaConfig(**SHAPE | {"head_dim": 32}), (9, 0), BF16, "head dim is 32, they know 64 and 128"),
    "windows": (MistralConfig(**SHAPE, sliding_window=8), (9, 0), BF16, "the model has sliding windows"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_they_cannot_run_torch_runs_and_it_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, capability, dtype, reason = REFUSALS[name]
    be(monkeypatch, capability)
    weights = weights_of(tmp_path, config, "none")
    backbone, (notice,) = serve_weights(weights, device=GPU, dtype=dtype)
    assert backbone.kernels.startswith("torch-")
    assert notice.startswith("the Triton kernels cannot be used (")
    assert reason in notice
    assert notice.endswith("): using torch operations, several times slower")
    assert "\n" not in notice
    with pytest.raises(BadRequestError, match=r"^the Triton kernels cannot be used: ") as error:
        serve_weights(weights, device=GPU, dtype=dtype, kernels=Kernels.TRITON)
    assert reason in str(error.value)
    assert not serve_weights(weights, device=GPU, dtype=dtype, kernels=Kernels.TORCH)[1], "it was asked for"


def test_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PLAN_MODULE, None)
    backbone, (notice,) = serve_weights(weights_of(tmp_path), device=GPU, dtype=BF16)
    assert backbone.kernels == "torch-nf4"
    assert "Triton cannot be imported" in notice


def test_other_makers_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    refusal = triton_refusal(weights_of(tmp_path).config, GPU, BF16, Quantization.NF4)
    assert refusal == "they need an NVIDIA GPU, and this torch is one for AMD's"


def test_on_a_cpu_they_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)  # no weights
    words = "the Triton kernels cannot be used: they need a GPU, and the device is cpu: choose `auto`"
    with pytest.raises(BadRequestError, match=f"^{words}$"):
        load_backbone(tmp_path, BackboneOptions(kernels=Kernels.TRITON, device="cpu"))


def test_int8_is_named_as_what_they_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, (9, 0))
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    options = BackboneOptions(kernels=Kernels.TRITON, quantization=Quantization.INT8, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(BadRequestError, match="they run NF4 and unquantised models, not int8: choose `auto`"):
        load_backbone(tmp_path, options)


def test_on_a_cpu_nobody_is_told_of_a_gpus_kernels(tmp_path: Path) -> None:
    weights_of(tmp_path)
    backbone, notices = load_backbone(
        tmp_path, BackboneOptions(kernels=Kernels.TORCH, quantization=None, dtype=FP32, device="cpu")
    )
    assert (backbone.kernels, notices) == ("torch-float32", [])
