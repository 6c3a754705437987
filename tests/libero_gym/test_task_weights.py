"""How often the vector environment samples which task."""

import numpy as np
import pytest

from libero_gym import LiberoVectorEnv


def tasks_of_resets(env: LiberoVectorEnv, resets: int) -> np.ndarray:
    return np.concatenate([env.reset()[1]["task_id"] for _ in range(resets)])


def test_tasks_are_sampled_by_weight_and_alike_without():
    env = LiberoVectorEnv("libero_spatial", 8, task_ids=[2, 5, 7], observe_images=False)
    env.reset(seed=0)
    assert env.task_ids == (2, 5, 7)
    env.set_task_weights([1, 0, 3])
    tasks = tasks_of_resets(env, 25)
    assert set(tasks) == {2, 7}
    assert np.mean(tasks == 7) == pytest.approx(0.75, abs=0.1)  # 3.3 standard deviations of 200 draws
    env.set_task_weights(None)
    assert set(tasks_of_resets(env, 5)) == {2, 5, 7}
    env.close()


def test_a_chosen_task_is_not_sampled_and_automatic_resets_are():
    env = LiberoVectorEnv(
        "libero_spatial", 2, task_ids=[0, 1], observe_images=False, horizon=1, autoreset_mode="SAME_STEP"
    )
    env.set_task_weights([0, 1])
    assert env.reset(seed=0, options={"task_id": 0})[1]["task_id"].tolist() == [0, 0]
    assert env.step(np.zeros((2, 7), np.float32))[4]["task_id"].tolist() == [1, 1]
    env.close()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"have shape \(1,\); give one for each of the tasks \[0, 1\]"),
        ([1.0, -1.0], "not negative"),
        ([0.0, 0.0], "not all 0"),
        ([1.0, np.nan], "finite"),
    ],
)
def test_weights_that_are_none_are_refused(weights: list[float], message: str):
    env = LiberoVectorEnv("libero_spatial", 2, task_ids=[0, 1], observe_images=False)
    with pytest.raises(ValueError, match=message):
        env.set_task_weights(weights)
    env.close()
