"""LIBERO's manipulation tasks as Gymnasium environments on a native runtime.

Importing the package registers `libero_gym/<suite>-v0`; MuJoCo, LIBERO and torch are imported only when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from libero_gym.registration import register_envs, register_suite
from libero_gym.tasks.suites import TaskSpec, get_task, horizon, list_suites, list_tasks

if TYPE_CHECKING:
    from libero_gym.env import LiberoEnv
    from libero_gym.physics.simulation import PhysicsError, Simulation
    from libero_gym.rendering.cameras import Camera, list_cameras
    from libero_gym.vector import LiberoVectorEnv

__all__ = [
    "Camera",
    "LiberoEnv",
    "LiberoVectorEnv",
    "PhysicsError",
    "Simulation",
    "TaskSpec",
    "get_task",
    "horizon",
    "list_cameras",
    "list_suites",
    "list_tasks",
    "register_envs",
    "register_suite",
]

_LAZY = {
    "Camera": "libero_gym.rendering.cameras",
    "list_cameras": "libero_gym.rendering.cameras",
    "LiberoEnv": "libero_gym.env",
    "LiberoVectorEnv": "libero_gym.vector",
    "PhysicsError": "libero_gym.physics.simulation",
    "Simulation": "libero_gym.physics.simulation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'libero_gym' has no attribute {name!r}")


register_envs()
