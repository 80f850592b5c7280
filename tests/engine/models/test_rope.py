import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.rope import RotaryEmbedding

HALF = 16  # head_dim 32
ORIGINAL = 64  # the length that the scaling types start from
TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn, every option": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.8,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [1.5 + 0.7 * i for i in range(HALF)],
        "original_max_position_embeddings": ORIGINAL,
        "factor": 4.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def hf_config(parameters: dict[str, object]) -> LlamaConfig:
    # Dynamic NTK starts from the model's own length, the others from their original one.
    length = ORIGINAL if parameters["rope_type"] == "dynamic" else 4 * ORIGINAL
    return LlamaConfig(
        hidden_size=4 * 2 * HALF,
        num_attention_heads=4,
        max_position_embeddings=length,
        rope_parameters={"rope_theta": 5000.0, **parameters},
    )


def theirs(rotary: LlamaRotaryEmbedding, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' angles to the bit, their cosines and sines rounded once: its own single-precision ones are a last
    place off here and there, and the first ones of a process now and then in the fourth (torch 2.13 on some CPUs)."""
    rotary(torch.zeros(1), positions[None])  # chooses the frequencies for this length
    angles = (positions[:, None].float() * rotary.inv_freq.float()).double()
    scaling = rotary.attention_scaling
    return angles.cos().float() * scaling, angles.sin().float() * scaling


def test_transformers_own_cosines_are_these_but_for_a_last_place() -> None:
    rotary = LlamaRotaryEmbedding(hf_config(TYPES["llama3"]))
    positions = torch.arange(200)
    rotary(torch.zeros(1), positions[None])  # the first single-precision cosines of a process may be wrong
    cos, sin = rotary(torch.zeros(1), positions[None])
    for single, exact in zip((cos, sin), theirs(rotary, positions), strict=True):
        torch.testing.assert_close(single[0, :, :HALF], exact, rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("prompt_length", [1, 40, ORIGINAL, ORIGINAL + 1, 100])
def test_prefill_then_decode_equals_transformers(name, prompt_length):
    config = hf_config(TYPES[name])
    rotary = LlamaRotaryEmbedding(config)
    rope = RotaryEmbedding(BackboneConfig.from_hf(config).rope)
    length = torch.tensor(prompt_length)
    chunks = [torch.arange(prompt_length), *(torch.tensor([position]) for position in range(prompt_length, 130))]
    for positions in chunks:
        for ours, expected in zip(rope.cos_sin(positions, length), theirs(rotary, positions), strict=True):
            assert ours.dtype == torch.float32
            exact = name != "dynamic" or int(positions.max()) < ORIGINAL
            torch.testing.assert_close(ours, expected, rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_a_row_does_not_depend_on_the_others(name):
    rope = RotaryEmbedding(BackboneConfig.from_hf(hf_config(TYPES[name])).rope)
    torch.manual_seed(0)
    positions = torch.randint(0, 200, (3, 7))
    lengths = torch.tensor([[1], [70], [150]])
    cos, sin = rope.cos_sin(positions, lengths)
    assert cos.shape == sin.shape == (3, 7, HALF)
    for b in range(3):
        for n in range(7):
            one_cos, one_sin = rope.cos_sin(positions[b, n : n + 1], lengths[b])
            assert torch.equal(cos[b, n], one_cos[0])
            assert torch.equal(sin[b, n], one_sin[0])


@pytest.mark.parametrize("name", TYPES)
def test_scaling_types_differ_from_the_default_beyond_the_original_length(name):
    def angles(parameters):
        rope = RotaryEmbedding(BackboneConfig.from_hf(hf_config(parameters)).rope)
        return rope.cos_sin(torch.tensor([100]), torch.tensor([100]))[0]

    assert torch.equal(angles(TYPES[name]), angles(TYPES["default"])) == (name == "default")


def test_the_old_spelling_is_the_same_embedding():
    new = hf_config(TYPES["llama3"])
    old = {
        "model_type": "llama",
        "hidden_size": new.hidden_size,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 8,
        "max_position_embeddings": new.max_position_embeddings,
        "rope_theta": 5000.0,
        "rope_scaling": {"type" if key == "rope_type" else key: value for key, value in TYPES["llama3"].items()},
    }
    assert BackboneConfig.from_hf(old).rope == BackboneConfig.from_hf(new).rope


def test_an_original_length_beside_the_parameters_wins():
    config = hf_config(TYPES["longrope"]).to_dict() | {"original_max_position_embeddings": 32}
    assert BackboneConfig.from_hf(config).rope.parameters["original_max_position_embeddings"] == 32
