"""A GR00T agent of 300,000 parameters: its whole training code runs in milliseconds."""

from dataclasses import replace
from typing import Any

import torch

from gr00t_agent import DatasetMetadata, Gr00tAgent, LiberoFrankaDataConfig, preset_policy
from gr00t_agent.config import ModelConfig
from gr00t_agent.loading import make_preprocessor


def tiny_config() -> ModelConfig:
    nano = ModelConfig.preset("nano")
    eagle, model = nano.eagle_json, nano.model_json
    eagle["force_image_size"] = 28
    eagle["text_config"] |= {
        "head_dim": 8, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    }  # fmt: skip
    eagle["vision_config"] |= {
        "hidden_size": 32, "image_size": 28, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
    }  # fmt: skip
    head = model["action_head_cfg"]
    head |= {"backbone_embedding_dim": 32, "hidden_size": 64, "input_embedding_dim": 64, "num_target_vision_tokens": 2}
    head["diffusion_model_cfg"] |= {
        "attention_head_dim": 32, "cross_attention_dim": 32, "num_attention_heads": 2, "num_layers": 2,
        "output_dim": 64,
    }  # fmt: skip
    head["vl_self_attention_cfg"] |= {"attention_head_dim": 16, "num_attention_heads": 2}
    model["backbone_cfg"]["select_layer"] = 1
    model["hidden_size"] = 32
    return ModelConfig.from_json(model, eagle)


def tiny_agent(metadata: DatasetMetadata, **policy_changes: Any) -> Gr00tAgent:
    """An agent whose every part is trained; its weights depend on torch's global seed."""
    policy = replace(preset_policy("nano"), value_hidden_dims=(8,), **policy_changes)
    config = tiny_config()
    preprocessor = make_preprocessor(config, policy, LiberoFrankaDataConfig(), metadata, "nano")
    agent = Gr00tAgent(config, policy, preprocessor)
    agent.set_trainable(tune_visual=True, tune_llm=True, tune_projector=True, tune_diffusion_model=True)
    for parameter in agent.value_parameters():
        parameter.requires_grad_(False)
    return agent.to(torch.float32)
