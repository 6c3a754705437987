"""Registers `libero_gym/<suite>-v0` with Gymnasium for every suite that is installed.

Runs when `libero_gym` is imported, which `gymnasium.make("libero_gym:libero_gym/libero_spatial-v0")` does by itself.
Costs a few file listings; neither MuJoCo nor LIBERO is imported.
"""

from __future__ import annotations

from gymnasium.envs.registration import register, registry

from libero_gym.tasks.suites import HORIZONS, list_suites


def register_envs() -> None:
    """Register the ids; a second call changes nothing.

    Where no distribution provides `libero`, or one has written over another, the base suites are registered all the
    same: making one of them then raises the error that says what to install, instead of Gymnasium's "namespace not
    found".
    """
    try:
        suites = list_suites()
    except ImportError:
        suites = list(HORIZONS)
    for suite in suites:
        env_id = f"libero_gym/{suite}-v0"
        if env_id not in registry:
            register(
                id=env_id,
                entry_point="libero_gym.env:LiberoEnv",
                vector_entry_point="libero_gym.vector:LiberoVectorEnv",
                kwargs={"suite": suite},
            )
