"""What the trainers and evaluations take as an agent, and a check that an agent of one's own is one.

Shape legend: B batch, C executed steps of an action chunk, a action width, H steps of a whole chunk, A their padded
width, F width of the features.
"""

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gr00t_agent.transforms import Observation


class Action(Protocol):
    """What an agent decides: a NamedTuple of tensors [B, ...], so that a trainer can store, index and join its rows."""

    @property
    def env_action(self) -> Tensor:
        """What the environment takes, float32 [B, C, a]."""
        ...


ActionT = TypeVar("ActionT", bound=Action)


class Agent(Protocol[ActionT]):
    """What the trainers need of a policy with a value function; `check_agent` tries all of it out.

    An agent is a `torch.nn.Module`; a trainer moves it, puts it into eval mode, wraps it for several processes and
    calls `forward` through the wrapper. Observations come as the environment returns them, mostly arrays on the host,
    and generators are the CPU's: the agent moves what it makes of them to the device of its weights, where all that it
    returns lies. Rows are independent of each other: what is returned for a row depends on no other row of the batch.

    With `--compile` an agent has a method `compile_network()` too, and with `--final-noise` its `forward` takes
    `noise_anneal`, the fraction of the exploration noise that is left. With `--imitation-coef` its actions have a
    `chain` [B, N + 1, H, A], and `forward` takes `flow_draws` and then returns the flow's error too, as
    `Gr00tAgent.score_with_flow_error` does (N denoising steps).
    """

    @property
    def image_size(self) -> int:
        """Height and width in pixels that the environment's cameras shall have."""
        ...

    def forward(
        self, obs: Observation, action: ActionT | None = None, *, generator: Sequence[torch.Generator] | None = None
    ) -> tuple[ActionT, Tensor, Tensor, Tensor]:
        """Decide with exploration, or score a stored action.

        Args:
            obs: A dict of arrays or tensors [B, ...] with GR00T's modality keys, or what `encode` made of it.
            action: A stored action to score; None decides.
            generator: One CPU generator per row, the only source of what a decision draws.

        Returns:
            action; log-probability and entropy (nats), both float32 [B], or [B, C] or [B, C, a] where they are told by
            step or element of `env_action`; value, float32 [B]. Scoring with unchanged weights gives the decision's
            log-probability. Gradients of the sum of the last three reach every parameter that is trained (except those
            that the module names in `_ddp_params_and_buffers_to_ignore`, as DistributedDataParallel wants them).
        """
        ...

    def get_value(self, obs: Observation) -> Tensor:
        """Return the values that `forward` gives, float32 [B]; takes what `encode` returns as well."""
        ...

    def predict(self, obs: Observation, *, generator: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return what the environment takes in an evaluation, without exploration: float32 [B, C, a].

        Args:
            obs: Observation.
            generator: One CPU generator per row, the only source of what is drawn, if anything is.
        """
        ...

    def encode(self, obs: Observation) -> Mapping[str, Tensor]:
        """Return what is stored of an observation and taken in its place: a dict of tensors [B, ...].

        It holds no gradient; each entry has the same shape and type for every observation of B rows. Whatever no
        trained parameter changes is best computed here: it is then computed once.
        """
        ...

    def param_groups(self, lr: float, value_lr: float) -> list[dict[str, Any]]:
        """Return optimiser groups with `name`, `params` and `lr`, which hold every trained parameter once.

        Args:
            lr: Step size of the policy.
            value_lr: Step size of the value head, whose group is named `value`.
        """
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write the weights, and whatever loading them takes, as files into a folder that exists.

        For training with sharded weights (FSDP2) it takes `state_dict`, the whole weights by name, too.
        """
        ...


class SteerableAgent(Protocol):
    """What `algorithms/dsrl_gr00t.py` needs of a frozen policy that denoises action chunks: no gradient, no value.

    A `torch.nn.Module` like `Agent`, which moves observations to its device and whose rows are independent of each
    other. With `--compile` it has a method `compile_network()` too.
    """

    @property
    def image_size(self) -> int:
        """Height and width in pixels that the environment's cameras shall have."""
        ...

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Steps H and width A of the noise that a chunk is denoised from; it was trained on N(0, 1)."""
        ...

    @property
    def action_dim(self) -> int:
        """Leading elements a of each step's noise that become an action; the rest is padding."""
        ...

    @property
    def value_feature_dim(self) -> int:
        """Width F of `value_features`."""
        ...

    def encode(self, obs: Observation) -> Mapping[str, Tensor]:
        """Return what the two methods below take in place of an observation: a dict of tensors [B, ...]."""
        ...

    def value_features(self, obs: Observation) -> Tensor:
        """Return what a critic shall see of an observation, or of `encode`'s result: float32 [B, F]."""
        ...

    def predict(self, obs: Observation, *, noise: Tensor) -> Tensor:
        """Return what the environment takes, a function of its arguments alone: float32 [B, C, a].

        Args:
            obs: Observation, or `encode`'s result.
            noise: float32 [B, H, A], what the chunk is denoised from.
        """
        ...


class Policy(Protocol):
    """What `algorithms/eval_gr00t.py --policy` needs of a policy of one's own: a decision for many environments.

    No module of PyTorch and no part of GR00T. A policy that remembers something of an episode, a history of pictures or
    a hidden state, has a method `reset(env_ids)` too, called with the numbers of the rows (list[int]) in which an
    episode begins, before the decision on its first observation.
    """

    @property
    def image_size(self) -> int:
        """Height and width in pixels that the environment's cameras shall have."""
        ...

    @property
    def num_action_chunks(self) -> int:
        """Environment steps C that are executed of each decision, unless the command line says otherwise."""
        ...

    def predict(self, obs: Observation, *, generator: Sequence[torch.Generator]) -> Tensor | NDArray[Any]:
        """Return a decision for each row: actions [N, H, a], of which the first C steps are executed (H >= C).

        For LIBERO a = 7: the change of the end effector's position (3) and of its rotation (3, axis-angle), both in
        units of the controller's largest step, and the gripper, -1 open and 1 closed; see `libero_gym.LiberoEnv`.

        Args:
            obs: Arrays of N rows: `video.image` and `video.wrist_image` uint8 [N, size, size, 3], turned upright;
                `state.x`, `.y`, `.z` (m), `.roll`, `.pitch`, `.yaw` (the axis-angle's components, rad) float32 [N, 1]
                and `state.gripper` (finger positions, m) float32 [N, 2]; the instruction under
                `annotation.human.action.task_description`, str [N]. A row whose episode is over holds its last
                observation; what is returned for it is not executed.
            generator: One CPU generator per row, made from (seed, task, initial state) when the episode begins. A
                policy that draws only from it is evaluated alike however many environments there are, and again
                after an interruption.
        """
        ...


# Relative deviation of a probability, and deviation of anything else, that counts as none.
TOLERANCE = 1e-3

_MEMBERS = {
    "forward": "define forward(self, obs, action=None, *, generator=None), which returns action, logprob, entropy and "
    "value",
    "get_value": "define get_value(self, obs), which returns the values [B]",
    "predict": "define predict(self, obs, *, generator=None), which returns actions [B, C, a] without exploration",
    "encode": "define encode(self, obs), which returns the dict of tensors that is stored in place of an observation",
    "param_groups": "define param_groups(self, lr, value_lr), which returns the optimiser's groups",
    "save_pretrained": "define save_pretrained(self, folder), which writes the weights into a folder",
}


def check_agent(agent: Any, obs: Observation, *, action_dim: int = 7, save: bool = True) -> None:
    """Check that the trainers can train an agent: calls all of `Agent` and raises at the first thing that is wrong.

    The agent is called in eval mode, as the trainers call it, and left as it was, gradients included.

    Args:
        agent: The agent.
        obs: An observation of at least two rows that differ (also in their instructions, where it has some), as the
            environment returns it.
        action_dim: Elements a of an environment action.
        save: Call `save_pretrained` once with a temporary folder, which takes the room that the weights take.

    Raises:
        TypeError: Something is missing, cannot be called as `Agent` says, or has another type.
        ValueError: A shape is wrong, a number is not finite, or a promise of `Agent` is not kept.
    """
    _check_members(agent)
    was_training = cast(nn.Module, agent).training
    agent.eval()
    try:
        with torch.no_grad():
            action = _check_decisions(agent, obs, action_dim)
            encoded = _check_encoding(agent, obs, action)
            _check_rows(agent, obs, action)
            _check_predictions(agent, obs, action.env_action)
        _check_gradients(agent, encoded, action)
        if save:
            _check_saving(agent)
    finally:
        agent.train(was_training)


def _call(what: str, remedy: str, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Call the agent; an error of its own is raised again with what was asked for."""
    try:
        return function(*inputs, **options)
    except Exception as error:
        raise TypeError(f"{what} raises {type(error).__name__}: {error}; {remedy}") from error


def _check_members(agent: Any) -> None:
    if not isinstance(agent, nn.Module):
        raise TypeError(f"the agent is a {type(agent).__name__}; make it a torch.nn.Module")
    for name, remedy in _MEMBERS.items():
        # Every module has a `forward`, which raises unless it is overridden.
        absent = type(agent).forward is nn.Module.forward if name == "forward" else not hasattr(agent, name)
        if absent or not callable(getattr(agent, name)):
            raise TypeError(f"the agent has no method {name}; {remedy}")
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "forward": (({}, None), {"generator": []}),
        "get_value": (({},), {}),
        "predict": (({},), {"generator": []}),
        "encode": (({},), {}),
        "param_groups": ((0.0, 0.0), {}),
        "save_pretrained": ((Path(),), {}),
    }
    for name, (inputs, options) in calls.items():
        try:
            inspect.signature(getattr(agent, name)).bind(*inputs, **options)
        except TypeError as error:
            raise TypeError(f"{name} cannot be called as the trainers call it ({error}); {_MEMBERS[name]}") from error
    size = getattr(agent, "image_size", None)
    if not isinstance(size, int) or size < 1:
        raise TypeError(f"image_size is {size!r}; make it the height and width of the cameras in pixels, an int")


def _num_rows(obs: Observation) -> int:
    sizes = {key: len(value) for key, value in obs.items()}
    if len(set(sizes.values())) != 1 or min(sizes.values()) < 2:
        raise ValueError(f"obs has rows {sizes}; give an observation of at least two rows, as many under each key")
    return next(iter(sizes.values()))


def _device(agent: nn.Module) -> torch.device | None:
    """Return where an agent's weights are; None if it has none."""
    return next((parameter.device for parameter in agent.parameters()), None)


def _rows(tree: Any, rows: Sequence[int]) -> Any:
    """Return some rows of an observation or an action."""
    picked = np.array(rows)
    if isinstance(tree, Mapping):
        return {key: _rows(value, rows) for key, value in cast(Mapping[str, Any], tree).items()}
    if isinstance(tree, tuple):
        return cast(Any, type(tree))._make(_rows(value, rows) for value in tree)
    return tree[torch.from_numpy(picked)] if isinstance(tree, Tensor) else np.asarray(tree)[picked]


def _generators(num_rows: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(num_rows)]


def _check_tensor(
    what: str,
    value: Any,
    shape: Sequence[int | None],
    remedy: str,
    dtype: Any = torch.float32,
    device: torch.device | None = None,
) -> None:
    """Refuse what is no finite tensor of this type, shape (None: of any size) and device (None of either: any).

    Raises:
        TypeError: No tensor, or of another type.
        ValueError: Of another shape, on another device, or not finite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}; {remedy}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{what} is {value.dtype}; make it {dtype}")
    sizes = list(value.shape)
    if len(sizes) != len(shape) or any(want not in (None, size) for want, size in zip(shape, sizes, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{what} has shape {sizes}, not [{wanted}]; {remedy}")
    if device is not None and value.device != device:
        raise ValueError(f"{what} is on {value.device}, the agent's weights are on {device}; move it to them")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{what} is not finite; the trainers stop at the first NaN or infinity")


def _deviation(new: Tensor, old: Tensor) -> float:
    return (new.float() - old.float()).abs().max().item()


def _check_scores(what: str, result: Any, num_rows: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Check what `forward` returned, apart from the action."""
    remedy = "return action, logprob, entropy, value"
    if not isinstance(result, tuple) or len(cast(tuple[Any, ...], result)) != 4:
        raise TypeError(f"{what} returns {type(result).__name__}, no tuple of four; {remedy}")
    action, logprob, entropy, value = cast(tuple[Any, Any, Any, Any], result)
    tail: list[None] = [None] * (max(1, logprob.ndim) - 1) if isinstance(logprob, Tensor) else []
    remedy = "return one log-probability per row, or one per row and step or element"
    _check_tensor(f"the log-probability of {what}", logprob, [num_rows, *tail], remedy)
    remedy = "return an entropy for each log-probability"
    _check_tensor(f"the entropy of {what}", entropy, list(logprob.shape), remedy)
    _check_tensor(f"the value of {what}", value, [num_rows], "return one value per row")
    return action, logprob, entropy, value


def _check_action(action: Any, num_rows: int, action_dim: int) -> None:
    fields = getattr(action, "_fields", None)
    remedy = "make the action a NamedTuple of tensors, one of them `env_action`, so that a trainer can pick its rows"
    if not isinstance(action, tuple) or fields is None:
        raise TypeError(f"the action is a {type(action).__name__}; {remedy}")
    if "env_action" not in fields:
        raise TypeError(f"the action has the fields {', '.join(fields)} and no env_action; {remedy}")
    for name in fields:
        value = getattr(action, name)
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != num_rows:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the action's {name} is {found}, which has no {num_rows} rows; {remedy}")
    remedy = f"return the C steps that are executed, each with {action_dim} elements"
    _check_tensor("env_action", cast(Any, action).env_action, [num_rows, None, action_dim], remedy)


def _check_decisions(agent: Any, obs: Observation, action_dim: int) -> Any:
    """Check decisions and their scores, and return a decision."""
    num_rows = _num_rows(obs)
    decide = "forward(obs, generator=one per row)"
    result = _call(decide, _MEMBERS["forward"], agent, obs, generator=_generators(num_rows, 0))
    action, logprob, entropy, value = _check_scores(decide, result, num_rows)
    _check_action(action, num_rows, action_dim)
    steps, elements = action.env_action.shape[1:]
    if tuple(logprob.shape[1:]) not in ((), (steps,), (steps, elements)):
        raise ValueError(
            f"the log-probability of {decide} has shape {list(logprob.shape)}; make it [{num_rows}], or "
            f"[{num_rows}, {steps}] or [{num_rows}, {steps}, {elements}] by step or element"
        )
    again, other = (
        _call(decide, _MEMBERS["forward"], agent, obs, generator=_generators(num_rows, seed))[0] for seed in (0, 1)
    )
    if not torch.equal(again.env_action, action.env_action):
        raise ValueError(
            "the same generators give other actions; draw from `generator` alone, so that a resumed run is the same run"
        )
    if torch.equal(other.env_action, action.env_action):
        raise ValueError("other generators give the same action; draw the exploration from `generator`")
    score = "forward(obs, action)"
    result = _call(score, "score the action that forward(obs) returned", agent, obs, action)
    _, new_logprob, new_entropy, new_value = _check_scores(score, result, num_rows)
    if new_logprob.shape != logprob.shape:
        raise ValueError(f"{score} gives log-probabilities {list(new_logprob.shape)}, {decide} {list(logprob.shape)}")
    ratio = (new_logprob - logprob).exp()
    if (deviation := (ratio - 1).abs().max().item()) > TOLERANCE:
        raise ValueError(
            f"scoring an action gives another log-probability than deciding it: the ratio is off 1 by {deviation:.3g} "
            f"(allowed: {TOLERANCE}); compute both from the same quantities, without dropout"
        )
    for name, new, old in (("entropy", new_entropy, entropy), ("value", new_value, value)):
        if _deviation(new, old) > TOLERANCE:
            raise ValueError(f"{score} gives another {name} than {decide}, by {_deviation(new, old):.3g}; it must not")
    values = _call("get_value(obs)", _MEMBERS["get_value"], agent.get_value, obs)
    _check_tensor("get_value(obs)", values, [num_rows], "return one value per row")
    if _deviation(values, value) > TOLERANCE:
        raise ValueError(
            f"get_value(obs) differs from the value of {decide} by {_deviation(values, value):.3g}; return the same"
        )
    return action


def _check_encoding(agent: Any, obs: Observation, action: Any) -> Mapping[str, Tensor]:
    """Check `encode` and that its result is taken in place of an observation, and return it."""
    num_rows = _num_rows(obs)
    with torch.enable_grad():
        encoded = _call("encode(obs)", _MEMBERS["encode"], agent.encode, obs)
    if not isinstance(encoded, Mapping) or not encoded:
        raise TypeError(f"encode(obs) returns a {type(encoded).__name__}; return a dict of tensors, not empty")
    for key, value in cast(Mapping[str, Any], encoded).items():
        what, remedy = f"encode(obs)[{key!r}]", "return tensors with the batch as their first dimension"
        ndim = value.ndim if isinstance(value, Tensor) else 0
        shape = [num_rows, *[None] * (max(1, ndim) - 1)]
        _check_tensor(what, value, shape, remedy, dtype=None, device=_device(agent))
        if value.requires_grad:
            raise ValueError(f"{what} requires gradients; leave what trained parameters decide to forward")
    remedy = "take what encode returns in place of an observation"
    expected = agent(obs, action)
    result = _call("forward(encode(obs), action)", remedy, agent, encoded, action)
    _, logprob, _, value = _check_scores("forward(encode(obs), action)", result, num_rows)
    values = _call("get_value(encode(obs))", remedy, agent.get_value, encoded)
    _check_tensor("get_value(encode(obs))", values, [num_rows], "return one value per row")
    for name, new, old in (
        ("forward(encode(obs), action) gives another log-probability", logprob, expected[1]),
        ("forward(encode(obs), action) gives another value", value, expected[3]),
        ("get_value(encode(obs)) gives another value", values, expected[3]),
    ):
        if _deviation(new, old) > TOLERANCE:
            raise ValueError(f"{name} than for the observation itself, by {_deviation(new, old):.3g}; {remedy}")
    return cast(Mapping[str, Tensor], encoded)


def _check_rows(agent: Any, obs: Observation, action: Any) -> None:
    """Check that a row's result depends on no other row. The batch keeps its size, so that rounding is the same."""
    num_rows = _num_rows(obs)
    single = _rows(obs, [0]), _rows(action, [0])
    one = _call("forward of one row", "make forward work for a batch of one", agent, *single)
    _check_scores("forward of one row", one, 1)
    _, logprob, _, value = agent(obs, action)
    drawn = agent(obs, generator=_generators(num_rows, 0))[0].env_action
    for row in (0, num_rows - 1):
        same = [row] * num_rows
        alone = _rows(obs, same)
        _, new_logprob, _, new_value = agent(alone, _rows(action, same))
        generators = [_generators(num_rows, 0)[row] for _ in range(num_rows)]
        new_drawn = agent(alone, generator=generators)[0].env_action
        for name, new, old in (
            ("log-probability", new_logprob, logprob),
            ("value", new_value, value),
            ("action", new_drawn, drawn),
        ):
            if _deviation(new[row], old[row]) > TOLERANCE:
                raise ValueError(
                    f"the {name} of row {row} changes by {_deviation(new[row], old[row]):.3g} with the other rows of "
                    "the batch; let nothing (padding, normalisation, noise) pass from row to row"
                )


def _check_predictions(agent: Any, obs: Observation, env_action: Tensor) -> None:
    num_rows = _num_rows(obs)
    what = "predict(obs, generator=one per row)"
    first, again = (
        _call(what, _MEMBERS["predict"], agent.predict, obs, generator=_generators(num_rows, 0)) for _ in range(2)
    )
    _check_tensor(what, first, list(env_action.shape), "return what env_action of a decision is, without exploration")
    if not torch.equal(first, again):
        raise ValueError(f"{what} gives other actions for the same generators; draw from `generator` alone")


def _check_gradients(agent: Any, encoded: Mapping[str, Tensor], action: Any) -> None:
    """Check the optimiser's groups, and that the losses reach what is in them."""
    trained = {id(p): name for name, p in cast(nn.Module, agent).named_parameters() if p.requires_grad}
    groups = _call("param_groups(lr, value_lr)", _MEMBERS["param_groups"], agent.param_groups, 1e-3, 2e-3)
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and {"name", "params", "lr"} <= set(cast(dict[str, Any], group)) for group in groups
    ):
        raise TypeError("param_groups returns no list of dicts with name, params and lr; the optimiser takes such ones")
    members = [(str(group["name"]), p) for group in cast(list[dict[str, Any]], groups) for p in group["params"]]
    ids = [id(p) for _, p in members]
    if missing := [name for key, name in trained.items() if key not in ids]:
        raise ValueError(f"param_groups lacks {', '.join(missing)}; put what is trained into a group, or freeze it")
    if len(set(ids)) != len(ids) or set(ids) - set(trained):
        raise ValueError("param_groups has a parameter twice, or one that is not trained; have each trained one once")
    if not any(name == "value" for name, _ in members):
        names = ", ".join(sorted({name for name, _ in members}))
        raise ValueError(f"param_groups has the groups {names}; name the value head's `value`")
    if any(group["name"] == "value" and group["lr"] != 2e-3 for group in cast(list[dict[str, Any]], groups)):
        raise ValueError("the group `value` does not have the step size value_lr; give it that one")

    _, logprob, entropy, value = agent(encoded, action)
    # Parameters that DistributedDataParallel is told not to wait for.
    ignored = set(cast(list[str], getattr(agent, "_ddp_params_and_buffers_to_ignore", [])))
    if not logprob.requires_grad or not value.requires_grad:
        name = "value" if logprob.requires_grad else "log-probability"
        raise ValueError(f"the {name} of forward(encode(obs), action) has no gradient; let what is trained decide it")
    parameters = [p for _, p in members]
    total = logprob.sum() + entropy.sum() + value.sum()
    for p, gradient in zip(parameters, _gradients(total, parameters), strict=True):
        name = trained[id(p)]
        if gradient is None and name not in ignored:
            raise ValueError(
                f"no gradient reaches {name}; freeze it, or name it in _ddp_params_and_buffers_to_ignore: several "
                "processes would wait for it for ever"
            )
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"the gradient of {name} is not finite; the trainers stop at the first NaN or infinity")
    for what, output, is_value in (("log-probability", logprob, False), ("value", value, True)):
        part = [p for name, p in members if (name == "value") == is_value]
        if not any(gradient is not None and bool((gradient != 0).any()) for gradient in _gradients(output.sum(), part)):
            where = "the group `value`" if is_value else "the groups beside `value`"
            raise ValueError(f"the {what} has no gradient in {where}; let what is trained there decide it")


def _gradients(total: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """Return the gradient of each parameter, None where there is none; what parameters hold in `grad` stays."""
    return torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True) if parameters else ()


def _check_saving(agent: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        _call("save_pretrained(folder)", _MEMBERS["save_pretrained"], agent.save_pretrained, Path(name))
        if not any(path.is_file() for path in Path(name).rglob("*")):
            raise ValueError("save_pretrained(folder) writes no file; write the weights there")
