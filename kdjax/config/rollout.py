"""The ``rollout`` group: how the student's own responses are drawn, and what is refused about them at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bridge.engine import EngineKind
from kdjax.config.group import group


@group
class RolloutConfig:
    engine: EngineKind = "sglang"
    """What runs the student for rollouts: SGLang, or plain transformers as the slow reference."""
    engines: int = Field(1, ge=0)
    """Engines that share the prompts of a step; 0: the teacher's own, taking the weights of both in turn."""
    tp: int = Field(1, ge=1)
    """Tensor-parallel size of each."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What they compute in; `auto` is student.dtype."""
    prompts: int | None = Field(None, ge=1)
    """Prompts in a step; none takes as many as are sure to fit its rows, were every response as long as allowed."""
    n_samples: int = Field(1, ge=1)
    """Responses to a prompt."""
    max_new_tokens: int = Field(256, ge=1)
    """Length of a response at most."""
    temperature: float = Field(1.0, gt=0)
    """Divides the student's logits before sampling."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this probability together."""
    top_k: int = Field(0, ge=0)
    """Sample among so many likeliest tokens; 0 means all."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a response, beside the end-of-sequence ids of model and tokenizer."""
    on_long_prompt: Literal["skip", "stop"] = "skip"
    """A prompt that leaves no room for max_new_tokens in data.max_len is skipped and counted, or stops the run."""
    truncated: Literal["keep", "drop", "mask_tail"] = "keep"
    """A response cut at max_new_tokens keeps its loss, is dropped, or loses the loss of its last `tail` tokens."""
    tail: int = Field(32, ge=1)
    """With `truncated: mask_tail`: how many."""
    max_staleness: int = Field(0, ge=0)
    """How many steps old the weights that wrote a response may be; 0 is strictly on-policy and takes turns."""
    sync_every: int = Field(1, ge=1)
    """Steps between weight syncs; more than 1 needs max_staleness."""
    importance_clip: float | None = Field(None, ge=1)
    """Weigh each token by trainer / engine probability, cut off here; none does not weigh."""
    max_k3: float | None = Field(0.05, gt=0)
    """Stop when trainer and engine disagree about sampled tokens by more (mean k3, in nats); none never stops."""
    reward: str | None = None
    """Task reward: a registered one, or `path/my.py:function` of prompt, response and row. `policy_gradient` learns
    from it, as any algorithm that reads `advantage`; others measure it."""
    reward_weight: float = Field(1.0, ge=0)
    """What the reward is multiplied by."""
    baseline: Literal["none", "group", "batch"] = "group"
    """Subtracted from a reward: the mean of the prompt's, or the step's, other rewards."""
    show_every: int | None = Field(50, ge=1)
    """Steps between responses that are shown, beside that of the first step; none shows none."""
    mem_fraction: float = Field(0.4, gt=0, lt=1)
    """Share of each GPU's whole memory that SGLang takes for weights and cache."""
    resident: tuple[Literal["weights", "kv_cache"], ...] = ()
    """With `colocate`: what stays on the devices while others have their turn."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further SGLang engine arguments, passed on as they are."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each engine; none leaves the choice to torch."""
    bucket_bytes: int = Field(256 * 2**20, ge=1)
    """Weights are sent in buckets of about this size."""
    start_timeout: float = Field(600.0, gt=0)
    """Seconds until an engine must be ready."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that the responses of one step, or one weight sync, may take."""
    restarts: int = Field(3, ge=0)
    """How often an engine that died or hung is started again for one step or sync, before the run ends."""

    def __post_init__(self) -> None:
        if self.sync_every > self.max_staleness + 1:
            raise ValueError(
                f"rollout.sync_every={self.sync_every} makes weights up to {self.sync_every - 1} steps old; set "
                f"rollout.max_staleness={self.sync_every - 1}, or sync_every=1"
            )
        if self.baseline == "group" and self.reward is not None and self.n_samples == 1:
            raise ValueError("rollout.baseline=group compares responses to one prompt: set rollout.n_samples, or batch")


def check_followers(config: Any) -> None:
    """Refuse what makes no sense where engines follow the student's weights. Raises ValueError."""
    if config.distill.on_policy_fraction:
        _check_on_policy(config)
    for key, whose, follows in (
        ("teacher.quantization", config.teacher.quantization, config.teacher.update_every is not None),
        ("rollout.args.quantization", config.rollout.args.get("quantization"), config.distill.on_policy_fraction),
    ):
        if whose is not None and follows:
            raise ValueError(
                f"{key}={whose}: a quantized engine takes no new weights as training makes them; leave it out"
            )
    if config.colocate and config.teacher.path is None:
        raise ValueError("colocate is for engines that share devices with the trainer: set teacher.path")
    teacher, student = config.teacher, config.student
    if teacher.update_every is None:
        if teacher.ema_decay:
            raise ValueError("teacher.ema_decay averages updates of the teacher: set teacher.update_every")
        if config.checkpoint.export_teacher:
            raise ValueError("checkpoint.export_teacher is for a teacher that changes: set teacher.update_every")
    elif teacher.ema_decay and student.param_dtype != "float32":
        raise ValueError(
            f"teacher.ema_decay: in {student.param_dtype} the small steps of an average round away; set "
            "student.param_dtype=float32"
        )
    elif teacher.dp > 1:
        raise ValueError(
            "teacher.update_every: SGLang takes no new weights where there are several copies; set teacher.dp=1"
        )
    elif student.init != "pretrained" or student.path != teacher.path:
        raise ValueError(
            "teacher.update_every makes the teacher an earlier self of the student, so both start alike: set "
            "teacher.path to student.path, with student.init=pretrained"
        )


def _check_on_policy(config: Any) -> None:
    rollout, distill = config.rollout, config.distill
    if config.teacher.path is None:
        raise ValueError("distill.on_policy_fraction: rollouts are judged by a teacher; set teacher.path")
    if distill.kd_ratio == 0:
        raise ValueError(
            "distill.on_policy_fraction with kd_ratio=0: cross-entropy on what the student itself wrote teaches it "
            "nothing; raise distill.kd_ratio"
        )
    if rollout.engines == 0 and (config.teacher.update_every is None or rollout.max_staleness):
        raise ValueError(
            "rollout.engines=0 lets one engine be teacher and student in turn: it needs a teacher of the student's "
            "shape that follows it (teacher.update_every), and rollout.max_staleness=0"
        )
    if rollout.max_new_tokens >= config.data.max_len:
        raise ValueError(
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in "
            f"data.max_len={config.data.max_len}; lower the one or raise the other"
        )
    if config.colocate and rollout.max_staleness:
        raise ValueError(
            f"colocate takes turns, so no response is older than its step: set rollout.max_staleness=0 (it is "
            f"{rollout.max_staleness})"
        )
