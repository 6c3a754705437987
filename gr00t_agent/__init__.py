"""GR00T-N1.5 as a reinforcement-learning agent.

PyTorch, transformers and diffusers, which take seconds to import, are imported when a name that needs them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr00t_agent.agent import Gr00tAgent
    from gr00t_agent.data_config import (
        DataConfig,
        DatasetMetadata,
        LiberoFrankaDataConfig,
        load_data_config,
        read_metadata,
        write_metadata,
    )
    from gr00t_agent.policy import FlowAction, PolicyConfig, SamplingDraws, preset_policy
    from gr00t_agent.protocol import Agent, Policy, SteerableAgent, check_agent

__all__ = [
    "Agent",
    "DataConfig",
    "DatasetMetadata",
    "FlowAction",
    "Gr00tAgent",
    "LiberoFrankaDataConfig",
    "Policy",
    "PolicyConfig",
    "SamplingDraws",
    "SteerableAgent",
    "check_agent",
    "load_data_config",
    "preset_policy",
    "read_metadata",
    "write_metadata",
]

_LAZY = {
    "Agent": "gr00t_agent.protocol",
    "DataConfig": "gr00t_agent.data_config",
    "DatasetMetadata": "gr00t_agent.data_config",
    "FlowAction": "gr00t_agent.policy",
    "Gr00tAgent": "gr00t_agent.agent",
    "LiberoFrankaDataConfig": "gr00t_agent.data_config",
    "Policy": "gr00t_agent.protocol",
    "PolicyConfig": "gr00t_agent.policy",
    "SamplingDraws": "gr00t_agent.policy",
    "SteerableAgent": "gr00t_agent.protocol",
    "check_agent": "gr00t_agent.protocol",
    "load_data_config": "gr00t_agent.data_config",
    "preset_policy": "gr00t_agent.policy",
    "read_metadata": "gr00t_agent.data_config",
    "write_metadata": "gr00t_agent.data_config",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gr00t_agent' has no attribute {name!r}")
