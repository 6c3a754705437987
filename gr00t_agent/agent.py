"""`Gr00tAgent`: GR00T-N1.5 behind the surface of a CleanRL agent.

Shape legend: B batch, V views, L prompt tokens, N denoising steps, H action horizon, A padded action width,
C executed steps of a chunk (`num_action_chunks`), a valid action width.
"""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gr00t_agent.action_head import ActionHead, HeadContext
from gr00t_agent.backbone import Backbone
from gr00t_agent.config import ModelConfig
from gr00t_agent.data_config import embodiment_id
from gr00t_agent.loading import Pretrained
from gr00t_agent.policy import FlowAction, NoiseSource, PolicyConfig, SamplingDraws
from gr00t_agent.sampler import Prediction
from gr00t_agent.transforms import Observation, Preprocessor, check_rows, pixels_from_bytes


class _Inputs(NamedTuple):
    """What the action head reads, in its type.

    Attributes:
        features: Backbone features [B, L, D], or what the VL self-attention makes of them.
        is_processed: It is the latter.
        readable: bool [B, L], None where all positions may be read.
        state: [B, 1, state].
    """

    features: Tensor
    is_processed: bool
    readable: Tensor | None
    state: Tensor


def _check_is_flow_action(action: Any) -> None:
    if not isinstance(action, FlowAction):
        raise TypeError(
            f"the action is a {type(action).__name__}, which does not tell how it was denoised; pass the FlowAction "
            "that was returned with it"
        )


class Gr00tAgent(Pretrained):
    """A GR00T-N1.5 policy with a value function.

    Observations are dicts with GR00T's modality keys: `video.*` uint8 [B, height, width, 3], `state.*` float32
    [B, width], and one instruction per row under the data config's language key; arrays or tensors. Wherever an
    observation is taken, the result of `encode` is taken as well.

    Build it with `from_preset` or `from_pretrained` (see `loading`).

    Args:
        config: Network sizes.
        policy: How the network is used.
        preprocessor: Observations to inputs, outputs to actions.
    """

    def __init__(self, config: ModelConfig, policy: PolicyConfig, preprocessor: Preprocessor) -> None:
        super().__init__(config, policy, preprocessor)
        head = config.action_head
        if not 0 < policy.num_action_chunks <= head.action_horizon:
            raise ValueError(
                f"num_action_chunks={policy.num_action_chunks} is not in 1-{head.action_horizon} (the action horizon)"
            )
        if policy.denoising_steps > head.num_timestep_buckets:
            raise ValueError(
                f"denoising_steps={policy.denoising_steps} exceeds num_timestep_buckets={head.num_timestep_buckets}; "
                "give fewer"
            )
        self.sampler = policy.sampler
        tag = preprocessor.data_config.embodiment_tag
        given = policy.embodiment_id
        self.embodiment = embodiment_id(tag, policy.embodiment_table) if given is None else given
        if not 0 <= self.embodiment < head.max_num_embodiments:
            raise ValueError(
                f"embodiment_id={self.embodiment} is not in 0-{head.max_num_embodiments - 1}; "
                "set PolicyConfig.embodiment_id"
            )
        self.backbone = Backbone(config)
        self.value_feature_dim = head.backbone_embedding_dim
        self.value_feature_dim += head.input_embedding_dim if policy.value_inputs == "vl_and_state" else 0
        self.action_head = ActionHead(
            head,
            value_in_dim=self.value_feature_dim if policy.value_head else 0,
            value_hidden_dims=policy.value_hidden_dims,
            noise_std_range=policy.noise_std_range if self.sampler.is_learned else None,
        )
        self._dropouts = [module for module in self.modules() if isinstance(module, nn.Dropout)]
        if policy.disable_dropout:
            for module in self._dropouts:
                module.p = 0.0
        # DistributedDataParallel waits for gradients of every parameter but these, which no output depends on.
        self._ddp_params_and_buffers_to_ignore = [f"backbone.{name}" for name in self.backbone.unused_parameter_names()]
        self._run_backbone: Any = self.backbone.forward
        self._run_process: Any = self.action_head.process_backbone
        self._run_prepare: Any = self.action_head.prepare
        self._run_context: Any = self.action_head.context
        self._run_velocity: Any = self.action_head.velocity
        self._uses_cuda_graphs = False
        self.set_trainable(tune_visual=False, tune_llm=False, tune_projector=True, tune_diffusion_model=True)

    # -- what is trained -------------------------------------------------------------------------------------------

    def set_trainable(
        self,
        *,
        tune_visual: bool,
        tune_llm: bool,
        tune_projector: bool = True,
        tune_diffusion_model: bool = True,
        tune_value: bool = True,
        tune_vl_self_attention: bool = True,
    ) -> None:
        """Choose what is trained; the rest gets no gradient and stays in eval mode.

        As in the reference, the future tokens are trained whatever the flags say.

        Args:
            tune_visual: Vision tower and connector.
            tune_llm: Language model.
            tune_projector: State encoder, action encoder and decoder, position embedding.
            tune_diffusion_model: DiT.
            tune_value: Value head; turn it off where the loss does not use it (supervised fine-tuning under DDP).
            tune_vl_self_attention: `vlln` and the VL self-attention, which the reference always trains. Where the
                backbone is not trained either, `encode` computes them, once for an observation.
        """
        self.trainable = {
            "tune_visual": tune_visual,
            "tune_llm": tune_llm,
            "tune_projector": tune_projector,
            "tune_diffusion_model": tune_diffusion_model,
            "tune_value": tune_value,
            "tune_vl_self_attention": tune_vl_self_attention,
        }
        self.requires_grad_(True)
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def _frozen_parts(self) -> Iterator[nn.Module]:
        eagle, head = self.backbone.eagle_model, self.action_head
        flags = self.trainable
        if not flags["tune_visual"]:
            yield from (eagle.vision_model, eagle.mlp1)
        if not flags["tune_llm"]:
            yield from (eagle.language_model, self.backbone.eagle_linear)
        if not flags["tune_projector"]:
            yield from (head.state_encoder, head.action_encoder, head.action_decoder, head.position_embedding)
        if not flags["tune_diffusion_model"]:
            yield head.model
        if not flags["tune_value"] and head.value_head is not None:
            yield head.value_head
        if not flags["tune_vl_self_attention"]:
            yield from (head.vlln, head.vl_self_attention)

    @property
    def backbone_is_frozen(self) -> bool:
        """True if no parameter of the backbone is trained, so that its features can be cached."""
        return not (self.trainable["tune_visual"] or self.trainable["tune_llm"])

    @property
    def context_is_frozen(self) -> bool:
        """True if neither the backbone nor the VL self-attention is trained: what they return can be cached."""
        return self.backbone_is_frozen and not self.trainable["tune_vl_self_attention"]

    def train(self, mode: bool = True) -> "Gr00tAgent":
        """Set training mode; frozen parts stay in eval mode."""
        super().train(mode)
        if mode:
            for part in self._frozen_parts():
                part.eval()
        return self

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the backbone."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the value head."""
        head = self.action_head.value_head
        return [] if head is None else [p for p in head.parameters() if p.requires_grad]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the action head without the value head."""
        value = {id(p) for p in self.value_parameters()}
        return [p for p in self.action_head.parameters() if p.requires_grad and id(p) not in value]

    def param_groups(self, lr: float, value_lr: float) -> list[dict[str, Any]]:
        """Return optimiser groups named `policy` (backbone included where trained) and `value`."""
        groups = [
            {"name": "policy", "params": self.policy_parameters() + self.backbone_parameters(), "lr": lr},
            {"name": "value", "params": self.value_parameters(), "lr": value_lr},
        ]
        return [group for group in groups if group["params"]]

    # -- the agent -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.action_head.vlln.weight.device

    @property
    def image_size(self) -> int:
        """Height and width in pixels that cameras should have: the metadata's, or just enough for the centre crop.

        Raises:
            ValueError: The cameras of the metadata are not square or differ.
        """
        data_config = self.preprocessor.data_config
        known = {self.preprocessor.metadata.resolution(key) for key in data_config.video_keys}
        if known == {None}:
            return -(-int(self.config.image_size / data_config.crop_scale) // 16) * 16
        sides = {side for resolution in known if resolution is not None for side in resolution}
        if len(sides) != 1 or None in known:
            raise ValueError(f"the cameras have no common square size: {known} (height, width)")
        return sides.pop()

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Steps H and width A of the noise that a chunk is denoised from."""
        return self.config.action_head.action_horizon, self.config.action_head.action_dim

    @property
    def action_dim(self) -> int:
        """Leading elements a of each step's noise that become an action; the rest is padding."""
        return self.preprocessor.action_dim

    def encode(self, obs: Observation) -> dict[str, Tensor]:
        """Return what of an observation does not depend on trained parameters, for storing and reuse.

        Args:
            obs: Observation.

        Returns:
            `state` float32 [B, 1, state], `valid_mask` bool [B, L], and with a frozen backbone
            `backbone_features` [B, L, D], or `vl_embs` [B, L, D] if the VL self-attention is frozen too, detached;
            otherwise `pixels` uint8 [B, V, 3, size, size] and `input_ids` int64 [B, L]. The shapes are the same for
            every observation, except with `padding="left"`. Rows can be concatenated and indexed.
        """
        if "valid_mask" in obs:
            return dict(cast(Mapping[str, Tensor], obs))
        with torch.no_grad():
            input_ids, valid_mask = self.preprocessor.tokens(obs, self.device)
            encoded = {
                "state": self.preprocessor.state(obs, self.device),
                "valid_mask": valid_mask,
                "pixels": self.preprocessor.images(obs, self.device),
                "input_ids": input_ids,
            }
            data_config = self.preprocessor.data_config
            names = {"input_ids": data_config.language_key, "state": "state.*", "pixels": "video.*"}
            check_rows({names[name]: len(encoded[name]) for name in names})
            if self.backbone_is_frozen:
                features = self._features(encoded)
                del encoded["pixels"], encoded["input_ids"]
                if self.context_is_frozen:
                    encoded["vl_embs"] = self._process(features, valid_mask)
                else:
                    encoded["backbone_features"] = features
        return encoded

    def forward(
        self,
        obs: Observation,
        action: FlowAction | None = None,
        *,
        sft_actions: Tensor | None = None,
        flow_draws: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Dispatch to `get_action_and_value`, to `sft_loss` if `sft_actions` is given, or to `score_with_flow_error`
        if `flow_draws` are.

        DistributedDataParallel synchronises gradients only for calls through the wrapper, that is, through here.
        """
        if sft_actions is not None:
            return self.sft_loss(obs, sft_actions, **options)
        if flow_draws is not None:
            return self.score_with_flow_error(obs, cast(FlowAction, action), flow_draws, **options)
        return self.get_action_and_value(obs, action, **options)

    def get_action_and_value(
        self,
        obs: Observation,
        action: FlowAction | None = None,
        *,
        generator: NoiseSource = None,
        noise_anneal: float = 1.0,
        draws: SamplingDraws | None = None,
    ) -> tuple[FlowAction, Tensor, Tensor, Tensor]:
        """Sample an action chunk with exploration noise, or score a stored one.

        Scoring with unchanged weights gives the rollout's log-probability bitwise in float32, on the same device and
        for the same rows in a batch.

        Args:
            obs: Observation, or `encode`'s result.
            action: Stored action to score; None samples.
            generator: Source of randomness for sampling; a sequence gives every row its own, so that what a row draws
                does not depend on its batch mates.
            noise_anneal: Fraction of the exploration noise left; scoring needs the value used when sampling.
            draws: Random numbers from outside; `generator`, a single one, draws what they leave out.

        Returns:
            action, log-probability, entropy, value [B]. Log-probability and entropy (nats, closed form) are [B],
            [B, C] or [B, C, a] by `logprob_level`, float32.

        Raises:
            TypeError: `action` is no `FlowAction`.
            ValueError: The policy has no value head, a stored chain has another number of steps or noise at others,
                or both a generator for each row and `draws` are given.
        """
        if action is not None:
            _check_is_flow_action(action)
        with self._without_dropout():
            context = self._context(obs)
            return self._decide_or_score(context, action, generator, noise_anneal, draws)

    def score_with_flow_error(
        self, obs: Observation, action: FlowAction, flow_draws: Sequence[Tensor], *, noise_anneal: float = 1.0
    ) -> tuple[FlowAction, Tensor, Tensor, Tensor, Tensor]:
        """Score decided actions, and return by how much the flow misses them besides.

        The observation is read once for both. The flow's error is flow matching's squared error of the velocity on the
        straight line from fresh noise to the chain's end, at the times at which the policy denoises. Its gradient makes
        what was decided more likely, whichever step was noised.

        Args:
            obs: Observation, or `encode`'s result.
            action: Decided in it.
            flow_draws: Standard normal noise [B, H, A] and denoising steps int64 [B] in 0 to N - 1.
            noise_anneal: As in `get_action_and_value`.

        Returns:
            What `get_action_and_value` returns, and the error, float32 [B, C, a].

        Raises:
            TypeError: `action` is no `FlowAction`.
        """
        _check_is_flow_action(action)
        noise, step = flow_draws
        target = action.chain[:, -1]
        tau = (step.float() / self.policy.denoising_steps)[:, None, None]
        point = (1 - tau) * noise + tau * target
        with self._without_dropout():
            context = self._context(obs)
            scored = self._decide_or_score(context, action, None, noise_anneal, None)
            velocity = self._predict(context, point, step, 1.0, learned_std=False).velocity
        error = (velocity - (target - noise)).square()
        return *scored, error[:, : self.policy.num_action_chunks, : self.preprocessor.action_dim]

    def get_value(self, obs: Observation) -> Tensor:
        """Return state values, float32 [B]."""
        return self._value(self._value_context(obs))

    @torch.no_grad()
    def value_features(self, obs: Observation) -> Tensor:
        """Return what the value head sees of an observation, float32 [B, value_feature_dim]; it needs no value head.

        These are the pooled vision-language features, followed by the state features if `value_inputs` says so.

        Args:
            obs: Observation, or `encode`'s result.
        """
        context = self._value_context(obs)
        with self._autocast():
            return self._value_inputs(context).float()

    @torch.no_grad()
    def predict(
        self,
        obs: Observation,
        *,
        generator: NoiseSource = None,
        noise: Tensor | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Return the deterministic action chunk for the environment, float32 [B, C, a].

        Args:
            obs: Observation, or `encode`'s result.
            generator: Source of the initial noise; a sequence gives every row its own, so that a row's action does
                not depend on its batch mates' noise.
            noise: Initial noise [B, H, A] instead.
            num_steps: Steps of the chunk, from the first on, instead of the C that are executed; at most H.

        Raises:
            ValueError: The chunk has fewer steps.
        """
        horizon = self.config.action_head.action_horizon
        steps = self.policy.num_action_chunks if num_steps is None else num_steps
        if not 1 <= steps <= horizon:
            raise ValueError(f"num_steps={steps} is not in 1-{horizon} (the action horizon)")
        return self.env_action(self.predict_chunk(obs, generator=generator, noise=noise), steps)

    @torch.no_grad()
    def predict_chunk(self, obs: Observation, *, generator: NoiseSource = None, noise: Tensor | None = None) -> Tensor:
        """Return the deterministic chunk in the network's normalised units, float32 [B, H, A]."""
        with self._without_dropout():
            context = self._context(obs)
            if noise is None:
                noise = self._initial_noise(context.state_features.shape[0], generator)
            return self.sampler.denoise(
                lambda x, step: self._predict(context, x, step, 1.0, learned_std=False), noise.to(self.device)
            )

    def sft_loss(
        self,
        obs: Observation,
        actions: Tensor,
        *,
        step_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        draws: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the flow-matching loss of demonstrated actions, a scalar.

        Args:
            obs: Observation, or `encode`'s result.
            actions: [B, H, a] as in the data: environment units, the gripper as `DataConfig.gripper_key` says.
            step_mask: bool [B, H], True at steps that count (False past the end of an episode).
            generator: Source of noise and time.
            draws: Noise [B, H, A] and time [B] from outside.

        Raises:
            ValueError: The actions are of another shape.
        """
        shape = (self.config.action_head.action_horizon, self.preprocessor.action_dim)
        if actions.ndim != 3 or tuple(actions.shape[1:]) != shape:
            raise ValueError(
                f"actions are {list(actions.shape)}; they must be [batch, {shape[0]}, {shape[1]}]: the network's "
                "action_horizon, which a dataset's data config must have too, and the width of the action parts"
            )
        target = self.preprocessor.normalise_actions(torch.as_tensor(actions).to(self.device))
        mask = torch.zeros_like(target)
        mask[..., : self.preprocessor.action_dim] = 1.0
        if step_mask is not None:
            mask = mask * step_mask.to(self.device)[..., None]
        if draws is None:
            draws = self._initial_noise(len(target), generator), self._training_time(len(target), generator)
        return self.flow_matching_loss(self._context(obs), target, mask, draws)

    def flow_matching_loss(
        self, context: HeadContext, target: Tensor, mask: Tensor, draws: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return sum(mask * error^2) / sum(mask) of the velocity at a random point between noise and `target`.

        Args:
            context: From `ActionHead.prepare`.
            target: Normalised actions [B, H, A].
            mask: [B, H, A], 1 where an element counts.
            draws: Noise [B, H, A] and time [B] in [0, 1].
        """
        noise, tau = draws
        point = (1 - tau[:, None, None]) * noise + tau[:, None, None] * target
        bucket = (tau * self.config.action_head.num_timestep_buckets).long()
        with self._autocast():
            velocity = self._run_velocity(context, point.to(context.state_features.dtype), bucket)[0]
        error = (velocity.float() - (target - noise)).square() * mask
        return error.sum() / mask.sum()

    def env_action(self, chunk: Tensor, num_steps: int | None = None) -> Tensor:
        """Map a chunk [B, H, A] in normalised units to environment actions, float32 [B, C, a].

        Args:
            chunk: The chunk.
            num_steps: Steps of it, from the first on, instead of the C that are executed.
        """
        steps = self.policy.num_action_chunks if num_steps is None else num_steps
        return self.preprocessor.to_env(self.preprocessor.unnormalise_actions(chunk[:, :steps]))

    def compile_network(self, mode: str | None = None, backend: str = "inductor") -> None:
        """Compile backbone and action head with torch.compile; results agree with the plain path to rounding.

        Log-probabilities of rollout and update then stay equal only if both run the compiled network.

        Args:
            mode: torch.compile's mode. `reduce-overhead` and `max-autotune` replay CUDA graphs: for small batches of
                one size, which launching kernels one by one holds up.
            backend: torch.compile's backend; `inductor` needs a C++ compiler on a CPU.
        """
        self._run_backbone = torch.compile(self.backbone.forward, mode=mode, backend=backend)
        self._run_process = torch.compile(self.action_head.process_backbone, mode=mode, backend=backend)
        self._run_prepare = torch.compile(self.action_head.prepare, mode=mode, backend=backend)
        self._run_context = torch.compile(self.action_head.context, mode=mode, backend=backend)
        self._run_velocity = torch.compile(self.action_head.velocity, mode=mode, backend=backend)
        self._uses_cuda_graphs = mode in ("reduce-overhead", "max-autotune")

    def _begin_call(self) -> None:
        """Let CUDA graphs overwrite what they returned in earlier calls."""
        if self._uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        """Type of the trained parameters; frozen ones may be stored in a smaller one."""
        return self.action_head.future_tokens.weight.dtype

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in `compute_dtype` where the parameters are kept in float32."""
        dtype = self.policy.torch_dtype
        needed = dtype != self._dtype and dtype != torch.float32
        # Not autocast(enabled=False), which would switch off an autocast of the caller's.
        return torch.autocast(self.device.type, dtype=dtype) if needed else contextlib.nullcontext()

    @contextlib.contextmanager
    def _without_dropout(self) -> Generator[None]:
        """Turn dropout off: a log-probability has to be a function of its arguments."""
        active = [module for module in self._dropouts if module.training and module.p > 0]
        for module in active:
            module.training = False
        try:
            yield
        finally:
            for module in active:
                module.training = True

    def _features(self, encoded: Mapping[str, Tensor]) -> Tensor:
        pixels = pixels_from_bytes(encoded["pixels"].flatten(0, 1), self._dtype)
        if self.policy.round_to_bf16:
            pixels = pixels.to(torch.bfloat16).to(pixels.dtype)
        mask = None if self.policy.padding == "masked" else encoded["valid_mask"]
        self._begin_call()
        with self._autocast():
            features = self._run_backbone(pixels, encoded["input_ids"], mask)
        return features.clone() if self._uses_cuda_graphs else features  # callers keep features over calls

    def _process(self, features: Tensor, valid_mask: Tensor) -> Tensor:
        """Return what the VL self-attention makes of backbone features, in the type that the network computes in."""
        self._begin_call()
        with self._autocast():
            vl_embs = self._run_process(features.to(self._dtype), self._readable(valid_mask))
        vl_embs = vl_embs.to(self.policy.torch_dtype)
        return vl_embs.clone() if self._uses_cuda_graphs else vl_embs

    def _readable(self, valid_mask: Tensor) -> Tensor | None:
        return valid_mask.to(self.device) if self.policy.padding == "masked" else None

    def _inputs(self, obs: Observation) -> _Inputs:
        encoded = self.encode(obs)
        for name, is_frozen, trained in (
            ("backbone_features", self.backbone_is_frozen, "the backbone"),
            ("vl_embs", self.context_is_frozen, "what computes them"),
        ):
            if name in encoded and not is_frozen and torch.is_grad_enabled():
                raise ValueError(f"the observation holds cached {name}, but {trained} is trained; encode it again")
        is_processed = "vl_embs" in encoded
        if is_processed:
            features = encoded["vl_embs"].to(self.device)
        elif "backbone_features" in encoded:
            features = encoded["backbone_features"].to(self.device)
        else:
            features = self._features({name: tensor.to(self.device) for name, tensor in encoded.items()})
        state = encoded["state"].to(self.device)
        if self.policy.round_to_bf16:
            state = state.to(torch.bfloat16)
        return _Inputs(
            features.to(self._dtype), is_processed, self._readable(encoded["valid_mask"]), state.to(self._dtype)
        )

    def _context(self, obs: Observation) -> HeadContext:
        inputs = self._inputs(obs)
        run = self._run_context if inputs.is_processed else self._run_prepare
        self._begin_call()
        with self._autocast():
            return run(inputs.features, inputs.readable, inputs.state, self.embodiment)

    def _decide_or_score(
        self,
        context: HeadContext,
        action: FlowAction | None,
        generator: NoiseSource,
        noise_anneal: float,
        draws: SamplingDraws | None,
    ) -> tuple[FlowAction, Tensor, Tensor, Tensor]:
        value = self._value(context)

        def velocity(x: Tensor, step: Tensor) -> Prediction:
            return self._predict(context, x, step, noise_anneal)

        if action is None:
            batch = context.state_features.shape[0]
            if isinstance(generator, Sequence):
                if draws is not None:
                    raise ValueError("a generator for each row and draws exclude each other; give one of them")
                draws, generator = self._draws_of_rows(generator, batch), None
            draws = SamplingDraws() if draws is None else draws
            noise = self._initial_noise(batch, generator) if draws.noise is None else draws.noise.to(self.device)
            index = draws.denoise_index
            if index is None:
                index = self.sampler.draw_index(batch, self.device, generator)
            chain, scores = self.sampler.sample(
                velocity,
                noise,
                index.to(self.device),
                step_noise=draws.step_noise,
                generator=generator,
                noise_anneal=noise_anneal,
            )
            chain = chain.detach()
            action = FlowAction(chain, index, self.env_action(chain[:, -1]))
        else:
            scores = self.sampler.evaluate(velocity, action.chain, action.denoise_index, noise_anneal=noise_anneal)
        entropy = scores.entropy.expand_as(scores.log_prob)
        return action, self._reduce(scores.log_prob), self._reduce(entropy), value

    def _predict(
        self, context: HeadContext, x: Tensor, step: Tensor, noise_anneal: float, *, learned_std: bool = True
    ) -> Prediction:
        bucket = step * self.config.action_head.num_timestep_buckets // self.policy.denoising_steps
        with self._autocast():
            velocity, hidden = self._run_velocity(context, x.to(context.state_features.dtype), bucket)
            net = self.action_head.reinflow_explore_noise_net
            std = net(hidden, noise_anneal) if net is not None and learned_std else None
        return Prediction(velocity.float(), std)

    def _value_context(self, obs: Observation) -> HeadContext:
        """Return a context without the keys and values that denoising alone needs."""
        with self._without_dropout(), self._autocast():
            vl_embs, is_processed, readable, state = self._inputs(obs)
            if not is_processed:
                vl_embs = self.action_head.process_backbone(vl_embs, readable)
            state_features = self.action_head.state_encoder(state, self.embodiment)
        return HeadContext(vl_embs, readable, state_features, [], self.embodiment)

    def _value_inputs(self, context: HeadContext) -> Tensor:
        features = self.action_head.pooled(context, self.policy.value_pooling)
        if self.policy.value_inputs == "vl_and_state":
            features = torch.cat([features, context.state_features.flatten(1).to(features.dtype)], dim=-1)
        return features  # [B, value_feature_dim]

    def _value(self, context: HeadContext) -> Tensor:
        head = self.action_head.value_head
        if head is None:
            raise ValueError("this policy has no value head; build it with PolicyConfig(value_head=True)")
        with self._autocast():
            features = self._value_inputs(context)
            return head(features.detach() if self.policy.critic_detach else features)

    def _initial_noise(self, batch: int, generator: NoiseSource) -> Tensor:
        if isinstance(generator, Sequence):
            if len(generator) != batch:
                raise ValueError(f"{len(generator)} generators were given for {batch} rows; give one per row")
            return torch.cat([self._initial_noise(1, one) for one in generator])
        head = self.config.action_head
        source = self.device if generator is None else generator.device
        shape = (batch, head.action_horizon, head.action_dim)
        return torch.randn(shape, generator=generator, device=source).to(self.device)

    def _draws_of_rows(self, generators: Sequence[torch.Generator], batch: int) -> SamplingDraws:
        """Return what each row draws from a generator of its own."""
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators were given for {batch} rows; give one per row")
        head, sampler, denoising_steps = self.config.action_head, self.sampler, self.policy.denoising_steps
        shape = (1 + (denoising_steps if sampler.is_joint else 1), head.action_horizon, head.action_dim)
        rows = [torch.randn(shape, generator=one, device=one.device) for one in generators]
        index = [sampler.draw_index(1, one.device, one) for one in generators]
        normal = torch.stack(rows, dim=1).to(self.device)  # [1 + draws, B, H, A]
        # A chain with one stochastic step uses one draw, whichever step that is.
        steps = normal[1:].expand(denoising_steps, -1, -1, -1)
        return SamplingDraws(normal[0], torch.cat(index).to(self.device), steps)

    def _training_time(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """Draw tau = (s - b) / s, b ~ Beta(alpha, beta), float32 [B]."""
        head = self.config.action_head
        source = self.device if generator is None else generator.device
        # torch.distributions takes no generator. With beta = 1, which is all that `config` lets through, the inverse of
        # the distribution function is u^(1/alpha).
        uniform = torch.rand(batch, generator=generator, device=source).to(self.device)
        return (head.noise_s - uniform ** (1 / head.noise_beta_alpha)) / head.noise_s

    def _reduce(self, elements: Tensor) -> Tensor:
        """Reduce [B, E, H, A] to the executed, valid elements at the configured level."""
        executed = elements[:, :, : self.policy.num_action_chunks, : self.preprocessor.action_dim]
        joined = executed.sum(dim=1) if self.policy.joint_reduction == "sum" else executed.mean(dim=1)  # [B, C, a]
        if self.policy.logprob_level == "token":
            return joined
        return joined.sum(dim=-1) if self.policy.logprob_level == "action" else joined.sum(dim=(-2, -1))
