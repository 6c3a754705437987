"""Scripted experts: policies that solve tasks from their BDDL goals and the simulation's privileged state.

`geometry` (shapes as point clouds), `grasps` (where to hold an object), `skills` (closed-loop motions: reach, pick,
place), `articulation` (drawers, doors, knobs, pushing), `containers` (where things go between walls), `insertion`
(compartments with a roof), `solver` (goal to skills), `expert` (skills to actions; episodes).
"""

from libero_gym.experts.expert import HUMAN_LIKE, Expert, ExpertConfig, ExpertEpisode, make_expert, run_expert

__all__ = ["HUMAN_LIKE", "Expert", "ExpertConfig", "ExpertEpisode", "make_expert", "run_expert"]
