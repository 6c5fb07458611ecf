"""The groups of a run's configuration. This file is the reference: ``python -m kdjax.train --help`` and the
documentation are generated from the fields and the line of text under each.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bridge.engine import EngineKind
from kdjax.config.generate import GenerateConfig
from kdjax.config.group import Dtype, group
from kdjax.config.rollout import RolloutConfig, check_followers

DEFAULT_BATCH = 8


@group
class StudentConfig:
    path: str | None = None
    """Hugging Face folder or hub id; `init: layers` takes the teacher's, `init: random` can do without."""
    init: Literal["pretrained", "random", "layers"] = "pretrained"
    """`pretrained` loads weights; `random` draws them; `layers` takes the chosen layers of the teacher."""
    layers: tuple[int, ...] = ()
    """With `init: layers`: which of the teacher's layers become the student's, in order."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Entries that replace those of config.json (hidden_size …), or all of it without a path; needs `init: random`."""
    dtype: Dtype = "float32"
    """What the forward and backward pass compute in."""
    param_dtype: Dtype = "float32"
    """What the optimizer updates; bfloat16 parameters lose small updates."""
    export_dtype: Dtype | None = None
    """What the exported weights are stored in; none keeps param_dtype."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or layers; `offload`: from inputs on the
    host."""
    scan_layers: bool = True
    """Compile one layer for all; false compiles each apart, which takes longer once and runs faster on a CPU."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Attention implementation; `cudnn` needs a GPU and bfloat16, and is at its best with `data.packing: false`."""

    def __post_init__(self) -> None:
        if self.init == "layers" and not self.layers:
            raise ValueError("student.layers: name the teacher's layers to keep, as in [0, 2, 4], or use another init")
        if self.init != "layers" and self.layers:
            raise ValueError("student.layers only goes with student.init=layers")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError("student.attention=cudnn needs student.dtype=bfloat16")
        if self.config and self.init != "random":
            raise ValueError("student.config changes shapes, so it needs student.init=random")


@group
class TeacherConfig:
    path: str | None = None
    """Hugging Face folder or hub id of the teacher; none means plain supervised fine-tuning."""
    engine: EngineKind = "sglang"
    """What runs the teacher: SGLang, or plain transformers as the slow reference."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the teacher computes in; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    tp: int = Field(1, ge=1)
    """Tensor-parallel size of the teacher."""
    pp: int = Field(1, ge=1)
    """Pipeline-parallel size of the teacher."""
    dp: int = Field(1, ge=1)
    """Data-parallel size: copies of the teacher, of tp · pp GPUs each; a document is read where its rows are used."""
    ep: int = Field(1, ge=1)
    """Expert-parallel size of a mixture-of-experts teacher."""
    mem_fraction: float = Field(0.4, gt=0, lt=1)
    """Share of each GPU's whole memory that SGLang takes for weights and cache."""
    quantization: str | None = None
    """SGLang quantization of the teacher's weights, as in `fp8`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further SGLang engine arguments, passed on as they are."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the engine; none leaves the choice to torch."""
    lookahead: int = Field(1, ge=0)
    """How many batches the teacher may be ahead of the student; 0 takes turns. Not read with rollouts or `colocate`."""
    batches_per_call: int = Field(1, ge=1)
    """Batches that the teacher is asked for at once: several where one is too small to keep it busy, or with `colocate`
    to wake it less often. Not read with rollouts, nor by a teacher that follows the student."""
    start_timeout: float = Field(600.0, gt=0)
    """Seconds until the engine must be ready."""
    timeout: float = Field(300.0, gt=0)
    """Seconds that one call may take in the engine."""
    restarts: int = Field(3, ge=0)
    """How often an engine that died or hung is started again for one call, before the run ends."""
    trust_remote_code: bool = False
    """Let the teacher's folder run its own code."""
    preflight: bool = True
    """Before step 1, compare log-probabilities recomputed from hidden rows with the engine's own."""
    update_every: int | None = Field(None, ge=1)
    """Self-distillation: so many steps between updates of a teacher that starts as the student; none never changes."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """What an update keeps of the teacher: decay · teacher + (1 − decay) · student; 0 copies the student."""
    resident: tuple[Literal["weights", "kv_cache"], ...] = ()
    """With `colocate`: what stays on the devices while others have their turn."""

    def __post_init__(self) -> None:
        if self.quantization is not None and self.engine != "sglang":
            raise ValueError(
                f"teacher.quantization={self.quantization} is SGLang's: set teacher.engine=sglang, or leave it out"
            )


@group
class SourceConfig:
    path: str
    """A file (jsonl, json, csv, parquet, arrow), a saved dataset folder, or a hub id."""
    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_response", "prompt", "text"] = "auto"
    """How a row is read; `auto` decides by its columns. `prompt` has no response: something for a model to answer."""
    split: str | None = None
    """Split of a dataset folder or hub id."""
    weight: float | None = Field(None, gt=0)
    """Share of this source when several are mixed; without weights each row comes once an epoch."""
    max_samples: int | None = Field(None, ge=1)
    """Use at most this many rows."""
    messages_key: str = "messages"
    """Column that holds chat messages."""
    prompt_key: str = "prompt"
    """Column that holds the prompt."""
    response_key: str = "response"
    """Column that holds the response."""
    text_key: str = "text"
    """Column that holds plain text."""
    teacher_input_key: str | None = None
    """Column with another prompt that only the teacher sees (context distillation)."""
    teacher_prompt: str | None = None
    """The same, written out: a text in which {column} stands for the row's entry."""

    def __post_init__(self) -> None:
        if self.teacher_input_key is not None and self.teacher_prompt is not None:
            raise ValueError("data: teacher_input_key and teacher_prompt say the same thing twice; keep one")


@group
class DataConfig:
    train: tuple[SourceConfig, ...] = ()
    """Training sources."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sources."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id; by default a pretrained student's own, else the teacher's."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """Passed on to the chat template, as in `{enable_thinking: false}`."""
    teacher_chat_template: str | None = None
    """A Jinja file by which the teacher reads the same conversations; none: as the student does."""
    teacher_template_args: dict[str, Any] | None = None
    """Passed on to the template that the teacher reads by; none: `template_args`."""
    system: str | None = None
    """A system message put before each conversation that has none."""
    max_len: int = Field(1024, ge=2)
    """Tokens in a packed row; longer documents are dropped or cut."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss: the assistant's, or every token."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run, or is skipped and counted."""
    on_long_row: Literal["drop", "truncate"] = "drop"
    """A document longer than max_len is dropped, or cut at its end; both are counted."""
    packing: bool = True
    """Pack several documents into a row; they never see each other."""
    packing_bins: int = Field(32, ge=1)
    """Rows that are filled at the same time; more waste less."""
    shuffle: bool = True
    """A new order every epoch."""
    workers: int = Field(2, ge=1)
    """Threads that read and tokenize; the order does not depend on it."""
    special_token_map: dict[str, str] = Field(default_factory=dict)
    """Student special token → teacher special token, where the same id has two names."""

    def __post_init__(self) -> None:
        if self.teacher_reads_apart and self.train_on == "all":
            raise ValueError(
                "data.train_on=all puts loss on the chat template's own tokens, and a teacher with another template "
                "reads others: set data.train_on=assistant, or drop teacher_chat_template and teacher_template_args"
            )

    @property
    def teacher_reads_apart(self) -> bool:
        """Whether the teacher has a chat template, or arguments of it, of its own."""
        return self.teacher_chat_template is not None or self.teacher_template_args is not None


@group
class DistillConfig:
    algorithm: str = "vanilla"
    """Registered algorithm, or `path/my.py:Class`."""
    loss: str | None = None
    """Registered divergence, or `path/my.py:function`; none means `rkl` with rollouts, even if only some, else `kl`."""
    kd_ratio: float | None = Field(None, ge=0, le=1)
    """Loss = (1 − kd_ratio) · cross-entropy + kd_ratio · divergence; none means 0.5, or 1 with nothing but rollouts,
    which carry no cross-entropy."""
    temperature: float = Field(1.0, gt=0)
    """Divides both logits before the divergence."""
    on_policy_fraction: float = Field(0.0, ge=0, le=1)
    """Share of prompts that the student answers itself (GKD's λ); the others keep the data's response, and those that
    have none are answered in any case."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the divergence, as in `{jsd_beta: 0.9}`."""
    algorithm_args: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the algorithm, as in `{feature_weight: 0.5}`."""

    def __post_init__(self) -> None:
        if self.loss is None:
            object.__setattr__(self, "loss", "rkl" if self.on_policy_fraction else "kl")
        if self.kd_ratio is None:
            object.__setattr__(self, "kd_ratio", 1.0 if self.on_policy_fraction == 1 else 0.5)
        if self.algorithm == "policy_gradient" and self.on_policy_fraction and (self.loss != "rkl" or self.loss_args):
            raise ValueError(
                "distill.loss and loss_args are for divergences; policy_gradient learns from its signal alone: leave "
                "them out, and set algorithm_args.signal"
            )


@group
class TrainConfig:
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; none means `epochs` passes over the data."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the data when `steps` is not given, to the nearest step that a sample of the data predicts."""
    batch_size: int | None = Field(None, ge=1)
    """Rows in one optimizer step, over all devices; none means 8, or what `tokens_per_batch` leads to."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Instead of batch_size and packing: positions in one optimizer step, as many short rows or as few long ones."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches that a step is computed in; the result does not depend on it."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay from the peak to min_lr after the warm-up."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end."""
    extra_lr: float | None = Field(None, gt=0)
    """Peak learning rate of an algorithm's own parameters; none means learning_rate."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's moment decays."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm; none does not."""
    offload: tuple[Literal["optimizer", "parameters"], ...] = ()
    """Kept in pinned host memory: optimizer state but for updates; parameters while engines work (`colocate`)."""
    compilation_cache: str | None = "auto"
    """Folder for compiled programs, found again at the next start; `auto`: the user's cache folder; none keeps none."""
    seed: int = Field(42, ge=0)
    """Decides initial weights and data order."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; none evaluates before and after only."""
    eval_rows: int | None = Field(None, ge=1)
    """Held-out rows to evaluate on; none means all. Their teacher states stay in memory for the whole run."""
    eval_functions: tuple[str, ...] = ()
    """Further evaluations: names given to `register_evaluation`, or `path/my.py:function`."""
    keep_best: bool = False
    """Export the weights with the lowest held-out loss instead of the last."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better held-out loss."""

    def __post_init__(self) -> None:
        if self.tokens_per_batch is not None and self.batch_size is not None:
            raise ValueError("train.batch_size and train.tokens_per_batch both say how large a batch is; keep one")
        if self.tokens_per_batch is None and self.batch_size is None:
            object.__setattr__(self, "batch_size", DEFAULT_BATCH)
        if self.batch_size is not None and self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate={self.accumulate} does not divide train.batch_size={self.batch_size}; "
                "choose a divisor"
            )
        if self.min_lr > self.learning_rate:
            raise ValueError(f"train.min_lr={self.min_lr} is above train.learning_rate={self.learning_rate}; lower it")
        if (self.keep_best or self.patience) and self.eval_every is None:
            raise ValueError("train.keep_best and train.patience compare evaluations: set train.eval_every")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"train.betas={list(self.betas)}: both must lie in [0, 1)")


@group
class MeshConfig:
    data: int = Field(-1, ge=-1)
    """Data-parallel size; -1 takes the devices that are left."""
    fsdp: int = Field(1, ge=-1)
    """Fully sharded data-parallel size: splits parameters, optimizer state and batch."""
    tensor: int = Field(1, ge=-1)
    """Tensor-parallel size: splits heads, MLP and vocabulary."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            if getattr(self, name) == 0:
                raise ValueError(f"mesh.{name}=0: give 1 or more, or -1 for the devices that are left")


@group
class CheckpointConfig:
    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; none saves at the end only."""
    keep: int = Field(2, ge=1)
    """How many checkpoints stay on disk."""
    check_export: bool = True
    """Load the exported student in plain transformers, on the CPU, and compare log-probabilities."""
    resume: bool = True
    """Go on from the newest whole checkpoint in the output folder."""
    export_teacher: bool = False
    """With `teacher.update_every`: also export the teacher that the student has become, to `export_teacher`."""


@group
class LogConfig:
    every: int = Field(10, ge=1)
    """Steps between lines of metrics; numbers of rollouts are recorded at every step."""
    profile: int = Field(0, ge=0)
    """Write a trace of so many steps to the output folder's `profile`, after a few that warm up."""
    tensorboard: bool = True
    """Write tensorboard event files."""
    wandb: bool = False
    """Send metrics to Weights & Biases; needs `pip install wandb`."""
    wandb_project: str = "kdjax"
    """Project there."""
    wandb_entity: str | None = None
    """User or organisation there; none takes the default of the login."""
    wandb_group: str | None = None
    """Group of runs there."""
    wandb_name: str | None = None
    """Name of the run there; none takes the name of the output folder."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes to the output folder, for `wandb sync` later."""
    report: bool = True
    """Write report.html and figures at the end; `python -m kdjax.report` writes them at any time."""
    samples: int = Field(0, ge=0)
    """How many held-out questions the exported student answers at the end, for the report."""
    sample_prompt: str | None = None
    """A question that the student answers at the end."""
    sample_tokens: int = Field(128, ge=1)
    """Length of an answer at most."""


@group
class Config:
    """One run. ``output`` holds everything it writes: config.yaml, metrics, checkpoints and the exported student."""

    output: str = "runs/run"
    """Folder of this run."""
    overwrite: bool = False
    """Start anew where the output folder holds a run, deleting what that run wrote."""
    colocate: bool = False
    """Engines and trainer share the devices and take turns: engines sleep, and free memory, while others work."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not self.data.train:
            raise ValueError("data.train is empty: name at least one source, as in data.train: [{path: rows.jsonl}]")
        if (
            self.student.path is None
            and self.student.init != "layers"
            and not self.student.config
            and not self.teacher.path
        ):
            raise ValueError("student.path is missing: a Hugging Face folder or hub id")
        if self.data.tokenizer is None and self.student.path is None and self.teacher.path is None:
            raise ValueError("data.tokenizer is missing: neither a student.path nor a teacher.path brings one")
        if self.student.init == "layers" and self.teacher.path is None:
            raise ValueError("student.init=layers takes the teacher's layers, but teacher.path is missing")
        asked = [key for key in ("eval_every", "eval_rows", "eval_functions") if getattr(self.train, key)]
        if self.data.eval == () and asked:
            raise ValueError(f"train.{asked[0]} needs held-out data: set data.eval")
        if self.log.samples and not (self.data.eval and self.checkpoint.check_export):
            raise ValueError("log.samples asks the exported student: set data.eval and checkpoint.check_export")
        if self.student.attention == "cudnn" and self.data.max_len % 2:  # its gradient is for even lengths alone
            raise ValueError(f"student.attention=cudnn needs an even data.max_len, not {self.data.max_len}")
        if "parameters" in self.train.offload and not self.colocate:
            raise ValueError(
                "train.offload=[parameters] puts them away while engines hold the devices: set colocate=true, or "
                "offload the optimizer alone"
            )
        self._check_budget()
        check_followers(self)

    def _check_budget(self) -> None:
        if self.train.tokens_per_batch is None:
            return
        if self.data.packing:
            raise ValueError(
                "train.tokens_per_batch puts one document in a row: set data.packing=false; packed rows hold "
                "train.batch_size × data.max_len tokens as it is"
            )
        if self.distill.on_policy_fraction:
            raise ValueError("train.tokens_per_batch takes documents of data; with rollouts set train.batch_size")
