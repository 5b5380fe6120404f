"""Write the golden arrays: tiny transformers models, their logits and their greedy texts.

Run `python tests/models/make_golden.py` where torch is installed; the files are committed.
"""

from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCALED_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Prompts go beyond the original positions of the scaled rope and beyond the sliding window.
VARIANTS: dict[str, dict[str, Any]] = {
    "tied_gqa": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "untied_llama3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "tie_word_embeddings": False,
        "rope_parameters": SCALED_ROPE,
    },
    "wide_heads": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "llama32": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_parameters": SCALED_ROPE,
    },
    "mistral": {
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "sliding_window": 5,
    },
    "mistral_full": {
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen25": {
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
}
# These repeat what the others show: they are compared where torch is installed.
NOT_COMMITTED = ("mistral_full", "qwen25")
LENGTHS = (30, 7, 23, 1)
NEW_TOKENS = 24


def torch_model(variant: str) -> Any:
    """The variant's model in float32 with seeded weights, norms and biases included."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(list(VARIANTS).index(variant))
    config = AutoConfig.for_model(**{"model_type": "llama", **COMMON, **VARIANTS[variant]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            if name.endswith(".bias"):
                weight.copy_(torch.randn_like(weight))
    return model


def torch_answers(model: Any) -> dict[str, np.ndarray]:
    """Logits of a padded batch and greedy continuations of each prompt alone."""
    import torch

    rng = np.random.default_rng(0)
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(3, int(COMMON["vocab_size"]), length)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    greedy = np.full((len(LENGTHS), NEW_TOKENS), -1, np.int32)
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        logits = model(ids, attention_mask=torch.tensor(mask)).logits.numpy()
        for row, length in enumerate(LENGTHS):
            prompt = ids[row : row + 1, :length]
            text = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
            )[0, length:].numpy()
            greedy[row, : len(text)] = text
    return {"tokens": tokens, "logits": logits, "greedy": greedy}


def main() -> None:
    """Write one file per committed variant."""
    GOLDEN.mkdir(exist_ok=True)
    for variant in [name for name in VARIANTS if name not in NOT_COMMITTED]:
        model = torch_model(variant)
        tied = VARIANTS[variant]["tie_word_embeddings"]
        weights = {
            f"weight/{name}": tensor.numpy()
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        config = np.array(model.config.to_json_string(use_diff=True))
        arrays: dict[str, Any] = {"config": config, **torch_answers(model), **weights}
        np.savez_compressed(GOLDEN / f"{variant}.npz", **arrays)


if __name__ == "__main__":
    main()
