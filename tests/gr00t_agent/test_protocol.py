"""The check of agents: right ones pass, and each kind of fault is named with its remedy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from examples.own_agent_in_ppo import MLPAgent
from gr00t_agent import Gr00tAgent, PolicyConfig, check_agent
from tests.gr00t_agent.conftest import make_observation

KEYS = tuple(f"state.{name}" for name in ("x", "y", "z", "roll", "pitch", "yaw", "gripper"))
OBS = make_observation(3)


def mlp() -> MLPAgent:
    torch.manual_seed(0)
    return MLPAgent(KEYS, 8, 2)


def test_nano_passes_with_a_trained_and_with_a_frozen_backbone():
    torch.manual_seed(0)
    agent = Gr00tAgent.from_preset("nano").train()
    check_agent(agent, OBS)
    assert agent.training
    assert all(p.grad is None for p in agent.parameters())
    agent.set_trainable(tune_visual=False, tune_llm=False)
    check_agent(agent, OBS, save=False)


def test_an_agent_of_ones_own_passes():
    agent = mlp()
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    check_agent(agent, OBS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())


def test_padding_that_is_read_is_found(tiny_checkpoint):
    agent = Gr00tAgent.from_pretrained(tiny_checkpoint, policy=PolicyConfig(padding="left"))
    with pytest.raises(ValueError, match=r"the log-probability of row 0 changes by .* let nothing \(padding"):
        check_agent(agent, make_observation(2, image_size=256))


class PlainAction:
    def __init__(self, env_action: Tensor):
        self.env_action = env_action


class NamelessAction(NamedTuple):
    actions: Tensor


class ListAction(NamedTuple):
    env_action: Tensor
    tasks: list[str]


def broken(**members: Any) -> MLPAgent:
    """An agent whose members are replaced; each function gets the right one's result or agent."""
    agent = mlp()
    agent.__class__ = type("Broken", (MLPAgent,), members)
    return agent


def forward_with(change: Callable[..., Any]) -> MLPAgent:
    """An agent that returns what `change(self, obs, action, result)` makes of the right result."""

    def forward(self, obs, action=None, *, generator=None):
        return change(self, obs, action, MLPAgent.forward(self, obs, action, generator=generator))

    return broken(forward=forward)


def replaced(result: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return *result[:place], value, *result[place + 1 :]


def with_action(action_type: Callable[[Tensor], Any]) -> MLPAgent:
    def change(self, obs, action, result):
        return result if action is not None else replaced(result, 0, action_type(result[0].env_action))

    return forward_with(change)


def encodes_nothing(self, obs):
    return obs if "state" in obs else {}


def encodes_itself(self, obs, action=None, *, generator=None):
    return MLPAgent.forward(self, MLPAgent.encode(self, obs), action, generator=generator)


def values_itself(self, obs):
    return MLPAgent.get_value(self, MLPAgent.encode(self, obs))


def ignores_generators(self, obs, action=None, *, generator=None):
    return MLPAgent.forward(self, obs, action, generator=[None for _ in range(3)])


def ignores_seeds(self, obs, action=None, *, generator=None):
    fixed = [torch.Generator().manual_seed(0) for _ in generator or ()]
    return MLPAgent.forward(self, obs, action, generator=fixed)


def refuses_encoded(self, obs, action=None, *, generator=None):
    return MLPAgent.forward(self, self.encode({key: obs[key] for key in KEYS}), action, generator=generator)


def misreads_encoded(self, obs, action=None, *, generator=None):
    action, logprob, entropy, value = MLPAgent.forward(self, obs, action, generator=generator)
    return action, logprob + ("state" in obs), entropy, value


def normalises_over_the_batch(self, obs):
    state = MLPAgent.encode(self, obs)["state"]
    return {"state": state - state.mean(0)}


def refuses_keys(self, obs, action=None, *, generator=None):
    return obs["state.elbow"]


def mixes_noise(self, obs, action=None, *, generator=None):
    shared = None if generator is None else [generator[0]] * len(generator)
    return MLPAgent.forward(self, obs, action, generator=shared)


def squeezes(self, obs, action, result):
    return replaced(result, 3, result[3].squeeze())


def groups(change: Callable[[list[dict[str, Any]]], Any]) -> MLPAgent:
    def param_groups(self, lr, value_lr):
        found = MLPAgent.param_groups(self, lr, value_lr)
        return change(found) or found

    return broken(param_groups=param_groups)


def with_unused_parameter() -> MLPAgent:
    agent = groups(lambda found: None)
    agent.actor.append(nn.Identity())
    agent.actor[-1].unused = nn.Parameter(torch.zeros(1))
    return agent


def explodes(self, obs, action, result):
    """Finite, with a gradient that is not: the square root of zero."""
    return replaced(result, 1, result[1] + 0 * (self.log_std - self.log_std.detach()).square().sum().sqrt())


class Module(nn.Module):
    image_size = 8


CASES = {
    "no module": (lambda: object(), TypeError, "the agent is a object; make it a torch.nn.Module"),
    "no forward": (lambda: Module(), TypeError, r"the agent has no method forward; define forward\(self, obs"),
    "no get_value": (lambda: broken(get_value=None), TypeError, "no method get_value; define get_value"),
    "no predict": (lambda: broken(predict=None), TypeError, "no method predict; define predict"),
    "no encode": (lambda: broken(encode=None), TypeError, "no method encode; define encode"),
    "no param_groups": (lambda: broken(param_groups=None), TypeError, "no method param_groups; define param_groups"),
    "no save": (lambda: broken(save_pretrained=None), TypeError, "no method save_pretrained; define save_pretrained"),
    "no image size": (lambda: broken(image_size=None), TypeError, "image_size is None; make it the height and width"),
    "no generator": (
        lambda: broken(forward=lambda self, obs, action=None: None),
        TypeError,
        r"forward cannot be called as the trainers call it \(.*generator.*\); define forward",
    ),
    "raises": (lambda: broken(forward=refuses_keys), TypeError, "raises KeyError: 'state.elbow'; define forward"),
    "three results": (lambda: forward_with(lambda *a: a[3][:3]), TypeError, "no tuple of four; return action, logprob"),
    "no tensor": (lambda: forward_with(lambda *a: replaced(a[3], 1, 0.0)), TypeError, "log-probability .* is a float"),
    "logprob of the batch": (
        lambda: forward_with(lambda *a: replaced(a[3], 1, a[3][1].sum())),
        ValueError,
        r"log-probability .* has shape \[\], not \[3\]; return one log-probability per row",
    ),
    "double": (
        lambda: forward_with(lambda *a: replaced(a[3], 1, a[3][1].double())),
        TypeError,
        r"log-probability .* is torch\.float64; make it torch\.float32",
    ),
    "other entropy": (
        lambda: forward_with(lambda *a: replaced(a[3], 2, a[3][2][:, None])),
        ValueError,
        r"entropy .* has shape \[3, 1\], not \[3\]; return an entropy for each log-probability",
    ),
    "value column": (
        lambda: forward_with(lambda *a: replaced(a[3], 3, a[3][3][:, None])),
        ValueError,
        r"value .* has shape \[3, 1\], not \[3\]; return one value per row",
    ),
    "not a number": (
        lambda: forward_with(lambda *a: replaced(a[3], 3, a[3][3] * float("nan"))),
        ValueError,
        "the value of .* is not finite",
    ),
    "plain action": (lambda: with_action(PlainAction), TypeError, "is a PlainAction; make the action a NamedTuple"),
    "tensor action": (lambda: with_action(lambda x: x), TypeError, "is a Tensor; make the action a NamedTuple"),
    "no env_action": (lambda: with_action(NamelessAction), TypeError, "the fields actions and no env_action"),
    "no rows": (lambda: with_action(lambda x: ListAction(x, ["a"] * 3)), ValueError, "the action's tasks is list"),
    "other rows": (
        lambda: with_action(lambda x: ListAction(x, x[0])),
        ValueError,
        r"the action's tasks is \[2, 7\], which has no 3 rows; make the action a NamedTuple",
    ),
    "action width": (
        lambda: with_action(lambda x: ListAction(x[..., :6], x)),
        ValueError,
        r"env_action has shape \[3, 2, 6\], not \[3, any, 7\]; return the C steps that are executed, each with 7",
    ),
    "own noise": (lambda: broken(forward=ignores_generators), ValueError, "the same generators give other actions"),
    "no exploration": (lambda: broken(forward=ignores_seeds), ValueError, "other generators give the same action"),
    "other score": (
        lambda: forward_with(lambda self, obs, action, r: replaced(r, 1, r[1] + 0.01 * (action is not None))),
        ValueError,
        r"another log-probability than deciding it: the ratio is off 1 by 0\.01.*compute both",
    ),
    "other value": (
        lambda: forward_with(lambda self, obs, action, r: replaced(r, 3, r[3] + 0.01 * (action is not None))),
        ValueError,
        r"forward\(obs, action\) gives another value than forward\(obs, generator",
    ),
    "other get_value": (
        lambda: broken(get_value=lambda self, obs: MLPAgent.get_value(self, obs) + 0.1),
        ValueError,
        r"get_value\(obs\) differs from the value of forward.* by 0\.1",
    ),
    "encode nothing": (
        lambda: broken(
            encode=lambda self, obs: obs if "state" in obs else {}, forward=encodes_itself, get_value=values_itself
        ),
        TypeError,
        r"encode\(obs\) returns a dict; return a dict of tensors, not empty",
    ),
    "encoded is refused": (
        lambda: broken(forward=refuses_encoded),
        TypeError,
        r"forward\(encode\(obs\), action\) raises KeyError: 'state\.x'; take what encode returns in place",
    ),
    "encoded is misread": (
        lambda: broken(forward=misreads_encoded),
        ValueError,
        r"forward\(encode\(obs\), action\) gives another log-probability than for the observation itself, by 1;",
    ),
    "encoded by what is trained": (
        lambda: broken(encode=lambda self, obs: {"state": MLPAgent.encode(self, obs)["state"] + self.log_std.sum()}),
        ValueError,
        r"encode\(obs\)\['state'\] requires gradients; leave what trained parameters decide to forward",
    ),
    "encoded elsewhere": (
        lambda: broken(encode=lambda self, obs: {**MLPAgent.encode(self, obs), "more": torch.zeros(3, device="meta")}),
        ValueError,
        r"encode\(obs\)\['more'\] is on meta, the agent's weights are on cpu; move it to them",
    ),
    "batch statistics": (
        lambda: broken(encode=normalises_over_the_batch),
        ValueError,
        r"the log-probability of row 0 changes by .* with the other rows",
    ),
    "shared noise": (
        lambda: broken(forward=mixes_noise),
        ValueError,
        r"the action of row \d changes by .* with the other rows",
    ),
    "batch of one": (
        lambda: forward_with(squeezes),
        ValueError,
        r"the value of forward of one row has shape \[\], not",
    ),
    "other prediction": (
        lambda: broken(predict=lambda self, obs, generator=None: MLPAgent.predict(self, obs)[:, :1]),
        ValueError,
        r"predict\(.*\) has shape \[3, 1, 7\], not \[3, 2, 7\]",
    ),
    "random prediction": (
        lambda: broken(predict=lambda self, obs, generator=None: torch.rand(3, 2, 7)),
        ValueError,
        r"predict\(.*\) gives other actions for the same generators",
    ),
    "groups": (lambda: groups(lambda found: {"params": []}), TypeError, "no list of dicts with name, params and lr"),
    "group without name": (lambda: groups(lambda found: [{"params": [], "lr": 0.1}]), TypeError, "no list of dicts"),
    "left out": (lambda: groups(lambda f: f[0]["params"].clear()), ValueError, "lacks log_std, .*; put what is"),
    "twice": (lambda: groups(lambda f: f[0]["params"].append(f[0]["params"][0])), ValueError, "has a parameter twice"),
    "critic not named": (
        lambda: groups(lambda f: f[1].update(name="critic")),
        ValueError,
        "name the value head's `value`",
    ),
    "critic's step size": (lambda: groups(lambda f: f[1].update(lr=f[0]["lr"])), ValueError, "step size value_lr"),
    "logprob in a column": (
        lambda: forward_with(lambda *a: (a[3][0], a[3][1][:, None], a[3][2][:, None], a[3][3])),
        ValueError,
        r"log-probability .* has shape \[3, 1\]; make it \[3\], or \[3, 2\] or \[3, 2, 7\] by step or element",
    ),
    "constant logprob": (
        lambda: forward_with(lambda *a: replaced(a[3], 1, a[3][1].detach())),
        ValueError,
        "the log-probability of .* has no gradient; let what is trained decide it",
    ),
    "unused": (with_unused_parameter, ValueError, "no gradient reaches actor.3.unused; freeze it, or name it"),
    "exploding gradient": (lambda: forward_with(explodes), ValueError, "the gradient of log_std is not finite"),
    "critic elsewhere": (
        lambda: forward_with(lambda s, o, a, r: replaced(r, 3, r[3].detach() + 0 * r[3] + r[1] - r[1].detach())),
        ValueError,
        "the value has no gradient in the group `value`",
    ),
    "saves nothing": (lambda: broken(save_pretrained=lambda self, folder: None), ValueError, "writes no file"),
}


@pytest.mark.parametrize("case", CASES)
def test_faults_are_named_with_their_remedy(case):
    make, error, message = CASES[case]
    with pytest.raises(error, match=message):
        check_agent(make(), OBS)


def test_observations_that_show_nothing_are_refused():
    with pytest.raises(ValueError, match="give an observation of at least two rows"):
        check_agent(mlp(), make_observation(1))
