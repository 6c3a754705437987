"""Registers `libero_gym/<suite>-v0` with Gymnasium for every suite that is installed.

Called by Gymnasium through the entry point group `gymnasium.envs`, in every process that imports Gymnasium: it
must stay cheap, and must not fail where LIBERO is absent.
"""

from __future__ import annotations

from gymnasium.envs.registration import register, registry

from libero_gym.suites import list_suites


def register_envs() -> None:
    """Register the ids; a second call changes nothing. Registers nothing if no distribution provides `libero`."""
    try:
        suites = list_suites()
    except ModuleNotFoundError:
        # Gymnasium turns an exception here into a warning at every import, for users who may never want LIBERO.
        return
    for suite in suites:
        env_id = f"libero_gym/{suite}-v0"
        if env_id not in registry:
            register(
                id=env_id,
                entry_point="libero_gym.env:LiberoEnv",
                vector_entry_point="libero_gym.vector:LiberoVectorEnv",
                kwargs={"suite": suite},
            )
