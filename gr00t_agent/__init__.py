"""GR00T-N1.5 as a reinforcement-learning agent."""

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
from gr00t_agent.protocol import Agent, SteerableAgent, check_agent

__all__ = [
    "Agent",
    "DataConfig",
    "DatasetMetadata",
    "FlowAction",
    "Gr00tAgent",
    "LiberoFrankaDataConfig",
    "PolicyConfig",
    "SamplingDraws",
    "SteerableAgent",
    "check_agent",
    "load_data_config",
    "preset_policy",
    "read_metadata",
    "write_metadata",
]
