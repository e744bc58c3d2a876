"""The one typed run configuration.

- ``RunConfig`` and its parts: every field is documented where it is defined; nothing else configures a run.
- ``load``: YAML file + dotted overrides (``model.layers=4``) -> ``RunConfig``. An unknown key or a wrong type is
  one line that names the field, and the nearest valid name.
- ``save``: the resolved configuration; loading it again reruns the run.

Fields marked [D] are decisions of this project where the paper is silent; ``docs/explanation/decisions.md`` gives the
reasons.
"""

import difflib
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.run_directory import RunDirectory
from armd_scale.traits import DEFAULT, TRAITS, Traits


def _known_objective(name: str) -> str:
    if name not in TRAITS:
        raise ValueError(f"there is no objective '{name}': choose from {', '.join(TRAITS)}")
    return name


Objective = Annotated[str, AfterValidator(_known_objective)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
TRAINING_ONLY = "training only"
"""Mark of a field of ``ModelConfig`` that the exported model does not need."""


class Section(BaseModel):
    """A part of a configuration file: typed, documented, an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class PrefixConfig(Section):
    """Prefix aggregation, the seed of the strictly causal stream (paper section 3.2)."""

    kernel: Literal["gaussian", "sinusoid", "learned"] = "gaussian"
    """Position embedding rows. ``gaussian``: sines at normal quantiles, so that the inner product is about
    exp(-distance^2 / 2 width^2) [D]; ``sinusoid``: the usual 10000-base table; ``learned``: a trained table."""
    width: Annotated[float, Field(gt=0.0)] = 2.0
    """Width of the Gaussian kernel in tokens (sigma) [D]."""
    dim: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Width of a position embedding row, d_pe; null: the model's width. The Gaussian kernel's far ripple falls with it;
    the decoding state is d_pe x hidden [D]."""
    scale: Literal["none", "sqrt", "mean"] = "none"
    """Divide the sum by 1, by the square root of the prefix size, or by the prefix size [D]."""
    target_position: bool = False
    """Add a learned projection of the target's own position embedding [D]."""


class ModelConfig(Section):
    """The network (docs/explanation/model.md)."""

    objective: Annotated[Objective, Field(exclude=True)] = DEFAULT
    """The run's ``objective``, which fills this in: it decides how many streams there are and what they see."""
    layers: Positive = 12
    """Number of transformer layers, L."""
    hidden: Positive = 768
    """Width of the residual stream, d."""
    heads: Positive = 12
    """Query heads."""
    kv_heads: Positive | None = None
    """Key and value heads of grouped-query attention; null: as many as query heads."""
    ffn: Positive | None = None
    """Inner width of the MLP; null: 4 x hidden for gelu, 8/3 x hidden rounded up to 128 for swiglu."""
    length: Annotated[int, Field(ge=2)] = 1024
    """Tokens in a sequence without BOS, N; also the length of a packed sample."""
    two_stream_layers: Positive | None = None
    """Leading layers with two streams; null: half of the layers, as in the paper. For objectives of two streams."""
    target_mlp: bool = True
    """Whether the target stream passes through the MLP of two-stream layers as well; the last of them always has it
    [D]."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, MLP and head; scale only, no bias [D]."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the MLP."""
    tied_head: bool = True
    """Use the token embedding as the output projection."""
    rope_base: Annotated[float, Field(gt=1.0)] = 10000.0
    """Base of the rotary frequencies; positions are always the original ones [D]."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the variance in every normalisation."""
    qk_norm: bool = False
    """RMSNorm of every head of queries and keys before the rotary embedding (as in Qwen3)."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (as in Qwen2)."""
    init_std: Annotated[float, Field(gt=0.0), TRAINING_ONLY] = 0.02
    """Standard deviation of initial weights; projections into the residual stream use it / sqrt(2 layers) [D]."""
    vocab_size: Positive | None = None
    """Size of the vocabulary; null: read from the data set's index."""
    bos_id: Count | None = None
    """Token id at position 0; null: read from the data set's index."""
    prefix: PrefixConfig = PrefixConfig()
    """Prefix aggregation."""

    @property
    def traits(self) -> Traits:
        """What the objective makes of the network."""
        return TRAITS[self.objective]

    @property
    def residual_std(self) -> float:
        """Standard deviation of initial projections into the residual stream."""
        return self.init_std / math.sqrt(2 * self.layers)

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        if self.ffn:
            return self.ffn
        return 4 * self.hidden if self.mlp == "gelu" else -(-8 * self.hidden // 3 // 128) * 128

    @property
    def two_stream(self) -> int:
        """Layers with two streams; 0 where the objective has one stream."""
        if self.traits.streams == 1:
            return 0
        return self.two_stream_layers or max(1, self.layers // 2)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def prefix_dim(self) -> int:
        return self.prefix.dim or self.hidden

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table: the vocabulary rounded up to 128, whatever the layout."""
        return -(-self.symbols // 128) * 128

    @property
    def streams(self) -> int:
        """Largest number of streams."""
        return 2 if self.two_stream else 1

    @property
    def symbols(self) -> int:
        """Entries of the vocabulary, and the mask token behind them where the objective has one."""
        assert self.vocab_size is not None
        return self.vocab_size + self.traits.mask

    def exported(self) -> dict[str, Any]:
        """Every field that the standalone model needs, with nulls filled in; those of ``prefix`` carry its name."""
        names = [name for name, field in type(self).model_fields.items() if TRAINING_ONLY not in field.metadata]
        values = {name: getattr(self, name) for name in names if name != "prefix"}
        resolved = {
            "kv_heads": self.key_heads,
            "ffn": self.ffn_width,
            "two_stream_layers": self.two_stream,
            "prefix_dim": self.prefix_dim,
        }
        return values | {f"prefix_{name}": value for name, value in self.prefix.model_dump().items()} | resolved

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        if self.hidden % self.heads or self.head_dim % 2:
            raise ValueError(f"hidden ({self.hidden}) must be an even multiple of heads ({self.heads})")
        if self.heads % self.key_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.key_heads})")
        if self.two_stream > self.layers:
            raise ValueError(f"two_stream_layers ({self.two_stream}) exceeds layers ({self.layers})")
        return self


class OrderConfig(Section):
    """Training phases of ``armd``: left to right, progressive permutation, strided fine-tuning (paper sections 3.4 and
    4). Objectives without phases ignore this section."""

    ar_steps: Count = 9_000
    """Steps trained left to right only, i_AR."""
    permutation_steps: Count = 48_000
    """Step at which the number of shuffled tokens reaches rho, i_perm."""
    rho: Count = 32
    """Tokens shuffled in each sequence from i_perm on; the model's length for fully random orders."""
    shuffle: Literal["scattered", "window"] = "scattered"
    """Which tokens are shuffled: drawn from the whole sequence, or a run of neighbours [D]."""
    strided_steps: Count = 0
    """Strided fine-tuning steps after the base training, i_SBP."""
    streams: list[Positive] = [1, 2, 4]
    """Numbers of streams of which each strided step draws one."""

    @model_validator(mode="after")
    def _grows(self) -> typing.Self:
        if self.permutation_steps < self.ar_steps:
            raise ValueError(
                f"permutation_steps ({self.permutation_steps}) must not come before ar_steps ({self.ar_steps})"
            )
        if self.strided_steps and not self.streams:
            raise ValueError("strided_steps needs at least one number in streams")
        return self


class DiffusionConfig(Section):
    """Noise of ``mdm`` (MDLM, arXiv 2406.07524) and ``card`` (CARD, arXiv 2601.22031)."""

    loss_form: Literal["time", "any-order"] = "any-order"
    """Of ``mdm``. ``time``: mask every token with probability t and weigh by 1 / t (MDLM; with t for lambda also
    RADD's), which has rare steps of a huge loss: use it with ``train.spike_nats=null``; ``any-order``: mask k tokens
    for a uniform k and weigh by N / k, so that no text's loss exceeds the mean NLL of its masked tokens. Equal in
    expectation (RADD, arXiv 2406.03736) [D]."""
    tail: Annotated[float, Field(ge=1.0)] = 1.5
    """Of ``card``: masks fall into the last ``tail`` t N positions of a text at time t, lambda."""
    beta: Annotated[float, Field(gt=0.0)] = 1.0
    """Of ``card``: a token whose context is clean has the weight 1 / beta."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Of ``card``: how fast the effect of a mask on the weights of the tokens behind it falls, p."""


class MixtureConfig(Section):
    """Another prepared data set that is read beside the run's own."""

    directory: str
    """Its folder, prepared with the same tokenizer and length."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Samples of it for each ``data.weight`` samples of the run's own data."""


class DataConfig(Section):
    """Text, tokenizer and shards."""

    directory: str | None = None
    """Where corpus, tokenizer and shards live; null: ``data`` in the run folder. Can be shared between runs."""
    text: list[str] = ["builtin:python"]
    """Files, folders or globs of text (txt, jsonl, zst and gz of these, parquet), or ``builtin:python``: the language
    reference and the docstrings that every Python installation carries."""
    text_field: str = "text"
    """Field of a jsonl record or parquet column that holds the text."""
    id_field: str = "id"
    """Field or column that holds the document's id, where there is one."""
    source_field: str = "source"
    """Field or column that says where the document comes from; where there is none, the name of its file does."""
    heldout_text: list[str] = []
    """Text for validation; empty: ``heldout_fraction`` of the documents of ``text``, chosen by their hash."""
    heldout_fraction: Fraction = 0.02
    """Share of the documents held out when ``heldout_text`` is empty."""
    tokenizer: str | None = None
    """A sentencepiece ``.model`` file or a folder with ``tokenizer.json``; null: train sentencepiece on ``text``."""
    vocab_size: Positive = 4096
    """Size of a tokenizer trained here."""
    samples_per_shard: Positive = 8192
    """Packed samples in one WebDataset shard."""
    min_characters: Count = 0
    """Shorter documents are left out, and counted."""
    max_characters: Positive | None = None
    """Longer documents are left out, and counted; null: none are."""
    deduplicate: bool = False
    """Leave out documents whose text was there before, and training documents that are held out."""
    max_bad_fraction: Fraction = 0.01
    """Largest share of the records that may be unreadable; they are counted and listed in ``bad.jsonl``."""
    skip_steps: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []
    """Ranges [first, last) of steps whose samples are left out, after a loss spike say; growing, numbered as in a run
    that leaves nothing out. Can be changed while a run stands before the range."""
    workers: Positive | None = None
    """Processes that prepare the data in a job; null: one for each core that the job may use."""
    jobs: Positive = 1
    """Jobs that share the preparation of the data, as an array; more than 1 pays from some 10 GB of text on."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Weight of this data in a mixture."""
    mixture: list[MixtureConfig] = []
    """Other prepared data sets to train on as well; held out is this one's text."""
    verify: bool = True
    """Check the SHA-256 of every shard whenever a run starts or goes on."""
    damaged_shards: Literal["stop", "leave_out"] = "stop"
    """What is done about training shards that are damaged or missing: stop, or go on without their samples."""

    @model_validator(mode="after")
    def _grows(self) -> typing.Self:
        edges = [edge for pair in self.skip_steps for edge in pair]
        if sorted(set(edges)) != edges:
            raise ValueError(f"skip_steps = {self.skip_steps} must be growing ranges [first, last) that do not touch")
        return self


class OptimizerConfig(Section):
    """AdamW with warm-up and an exponential moving average of the weights (SEDD's settings by default)."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: Count = 2_500
    """Steps of linear warm-up from 0."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """End of the cosine as a share of the peak."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay on matrices."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest global gradient norm."""
    ema: Fraction = 0.9999
    """Decay of the average of the weights that is evaluated and exported; 0 keeps none."""


class TrainConfig(Section):
    """The loop."""

    steps: Positive = 400_000
    """Steps of the base training; strided fine-tuning comes on top."""
    global_batch: Positive = 512
    """Sequences in one optimiser step, over all ranks and micro-batches."""
    micro_batch: Positive = 8
    """Sequences in one forward pass of one rank."""
    head_batch: Positive | None = None
    """Sequences of a micro-batch whose logits exist at a time; they are computed again in the backward pass; null: all
    of them, once."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations; master weights and moments are always float32, and so are sums of gradients, but
    for those of micro-batches with ZeRO-2 and 3."""
    fp8: bool = False
    """Products of the layers in FP8, each tensor with a scale of its own: e4m3 forward, e5m2 for gradients. On CUDA by
    TransformerEngine; on a CPU numbers are rounded as there, which shows what it does to the loss and is slower."""
    attention: Literal["measured", "flash", "cudnn", "FA3", "FA4"] = "measured"
    """Kernel of attention without a mask. ``measured``: on CUDA the fastest on the shapes of the run, measured at its
    start; on a CPU PyTorch's choice. FA3 and FA4 need FlashAttention-3 or 4."""
    log_every: Positive = 10
    """Steps between two lines of ``metrics.jsonl``."""
    eval_every: Positive = 1_000
    """Steps between two held-out evaluations."""
    eval_samples: Positive = 512
    """Held-out samples in an evaluation during training."""
    eval_streams: Positive = 4
    """Streams of the strided order in an evaluation."""
    checkpoint_every: Positive = 1_000
    """Steps between two checkpoints."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept, the newest ones."""
    keep_every: Positive | None = None
    """Keep the checkpoints whose step is a multiple of this as well; null: only the newest ones."""
    spike_nats: Annotated[float, Field(gt=0.0)] | None = 3.0
    """A step whose loss lies so far above the median of the last 64 is not applied; null: only what is not finite."""
    max_skipped: Positive = 5
    """Steps in a row that may fail so; then the run goes back to its newest checkpoint and leaves out their samples."""
    max_rollbacks: Count = 2
    """How often a job may go back; then it stops."""
    hang_factor: Annotated[float, Field(gt=1.0)] = 10.0
    """A step that takes so many times the median is a hang: every rank writes its stack and ends."""
    hang_seconds: Annotated[float, Field(gt=0.0)] = 300.0
    """Shortest time that is a hang."""
    log_samples: bool = False
    """Write the numbers of all samples that are trained on into ``samples/``, a file a rank."""
    profile: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step, as ``metrics.jsonl`` counts them, of which a PyTorch profile of CPU and GPU is written into
    ``profiles/``: a Chrome trace of the first rank of each pipeline stage; null: none. A job writes one profile."""

    @model_validator(mode="after")
    def _profiles_some_steps(self) -> typing.Self:
        if self.profile and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile = {self.profile} must be the first and the last step")
        return self


class ParallelConfig(Section):
    """Layout of the processes. What tensor and pipeline parallelism leave is data parallel."""

    tensor: Positive = 1
    """Tensor-parallel size: processes that share each layer."""
    sequence: bool = False
    """Split activations between the tensor-parallel regions along the sequence as well."""
    pipeline: Positive = 1
    """Pipeline-parallel size: groups of processes that hold consecutive layers."""
    chunks: Positive = 1
    """Runs of layers in each pipeline group; more than 1 interleaves them (a smaller bubble, more communication)."""
    cut: list[Positive] | None = None
    """First layers of all runs but the first, in order; null: cut so that the costliest run is as cheap as possible."""
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage over data parallel: 1 shards masters, moments and moving average, 2 gradients too, 3 weights
    too. With pipeline stages 0 or 1."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those inside attention, or all inside a layer."""

    def describe(self) -> str:
        """The model-parallel part of the layout in words."""
        parts = [f"tensor {self.tensor}" + (" (sequence parallel)" if self.sequence else "")]
        if self.pipeline > 1:
            parts.append(f"pipeline {self.pipeline}" + (f" (x {self.chunks}, interleaved)" if self.chunks > 1 else ""))
        return " x ".join(parts)


class ReportConfig(Section):
    """What is done with the trained model at the end of the main job, and what it is logged to."""

    heldout_samples: Positive = 256
    """Held-out samples scored by the exported model."""
    generate_streams: Annotated[list[Positive], Field(min_length=1)] = [1, 2, 4]
    """Numbers of streams for the samples."""
    prompt: str = ""
    """Prompt of the samples."""
    wandb: Literal["auto", "disabled"] = "auto"
    """``auto``: Weights & Biases, online when WANDB_API_KEY is set, else offline in the run folder."""


class StageConfig(Section):
    """Resources of a job of one stage; null: those of a training task."""

    cpus: Positive | None = None
    """CPU cores; null: ``cluster.cpus_per_task``."""
    gpus: Count | None = None
    """GPUs; null: none for tokenising, one for the others where the cluster has them."""
    memory_gb: Positive | None = None
    """Memory of the machine; null: Slurm's default."""
    timeout_minutes: Positive | None = None
    """Time limit; null: ``cluster.timeout_minutes``."""
    partition: str | None = None
    """Slurm partition; null: ``cluster.partition``."""


class ClusterConfig(Section):
    """Where the processes run."""

    nodes: Positive = 1
    """Machines."""
    tasks_per_node: Positive = 1
    """Processes on a machine: one per GPU."""
    cpus_per_task: Positive = 1
    """CPU cores of a process; also its number of threads."""
    gpus_per_node: Count = 0
    """GPUs of a machine; 0: run on CPU with gloo."""
    timeout_minutes: Positive = 24 * 60
    """Time limit of a Slurm job."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    memory_gb: Positive | None = None
    """Memory of a machine of the training job; null: Slurm's default."""
    tokenise: StageConfig = StageConfig()
    """Jobs that prepare the data, ``data.jobs`` of them."""
    export: StageConfig = StageConfig()
    """The job that writes the standalone model."""
    evaluate: StageConfig = StageConfig()
    """The job that scores it and writes the report."""
    setup: list[str] = []
    """Shell lines before the processes start: modules, conda."""
    python: str | None = None
    """Command that starts Python in a Slurm job, ``apptainer exec --nv image.sif python`` say; null: this Python."""
    environment: dict[str, str] = {}
    """Environment variables of the jobs; they override the defaults (``launchers/jobs.py``); PYTHONPATH is added to."""
    sbatch: dict[str, str | int | bool] = {}
    """Further options of sbatch, by their long names."""
    warn_seconds: Positive = 180
    """How long before its time limit a job is told, so that it can write a checkpoint and be queued again."""
    max_restarts: Count = 5
    """How often in a row a job that died is started again before a new checkpoint is written."""
    backoff_seconds: Annotated[float, Field(ge=0.0)] = 10.0
    """Wait before the first new start; doubled each time, to 10 minutes at most."""

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


class RunConfig(Section):
    """Everything that defines a run."""

    name: str = DEFAULT
    """Name of the run."""
    run_dir: str | None = None
    """Run folder; null: ``runs/<name>``."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initial weights, data order and generation orders."""
    objective: Objective = DEFAULT
    """What is trained on the same data, layers, optimiser and layout (docs/explanation/objectives.md). ``armd``:
    auto-regressive masked diffusion; ``ar``: left to right with one causal stream (a GPT-2); ``mdm``: absorbing masked
    diffusion, one stream that sees everything; ``card``: causal diffusion, one causal stream with a noised tail."""
    model: ModelConfig = ModelConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Noise."""
    orders: OrderConfig = OrderConfig()
    """Training phases."""
    data: DataConfig = DataConfig()
    """Text and shards."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser."""
    train: TrainConfig = TrainConfig()
    """Loop."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the processes."""
    report: ReportConfig = ReportConfig()
    """End of the job."""
    cluster: ClusterConfig = ClusterConfig()
    """Machines."""

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def run_directory(self) -> RunDirectory:
        """The files of the run in ``directory``."""
        return RunDirectory(self.directory)

    @property
    def data_directory(self) -> Path:
        return Path(self.data.directory) if self.data.directory else self.run_directory.data

    @property
    def total_steps(self) -> int:
        """Steps of the base training and of strided fine-tuning, where the objective has it."""
        return self.train.steps + (self.orders.strided_steps if self.traits.phases else 0)

    @property
    def traits(self) -> Traits:
        """What there is to know of the objective."""
        return TRAITS[self.objective]

    @property
    def data_parallel(self) -> int:
        return self.cluster.processes // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def micro_batches(self) -> int:
        """Micro-batches that one rank accumulates in a step."""
        return self.train.global_batch // (self.data_parallel * self.train.micro_batch)

    @model_validator(mode="before")
    @classmethod
    def _pass_on_objective(cls, values: Any) -> Any:
        """Let the network know the objective."""
        if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
            return values
        objective = values.get("objective", DEFAULT)
        return {**values, "model": {"objective": objective, **values.get("model", {})}}

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        tensor, model = self.parallel.tensor, self.model
        if model.objective != self.objective:
            raise ValueError(f"model.objective follows objective = {self.objective}: set objective alone")
        self._check_layout()
        for name, value in (("heads", model.heads), ("kv_heads", model.key_heads), ("ffn", model.ffn_width)):
            if value % tensor:
                raise ValueError(f"model.{name} = {value} is not a multiple of parallel.tensor = {tensor}")
        if 128 % tensor:
            raise ValueError(f"parallel.tensor = {tensor} must divide 128, the padding of the vocabulary")
        if self.parallel.sequence and model.length % tensor:
            raise ValueError(
                f"parallel.sequence needs model.length = {model.length} to be a multiple of parallel.tensor = {tensor}"
            )
        per_pass = self.data_parallel * self.train.micro_batch
        if self.train.global_batch % per_pass:
            raise ValueError(
                f"train.global_batch = {self.train.global_batch} is not a multiple of {per_pass} = train.micro_batch "
                f"({self.train.micro_batch}) x data-parallel processes ({self.data_parallel})"
            )
        if self.parallel.chunks > 1 and self.micro_batches % self.parallel.pipeline:
            raise ValueError(
                f"interleaved stages need the micro-batches of a step ({self.micro_batches}) to be a multiple of "
                f"parallel.pipeline = {self.parallel.pipeline}; change train.micro_batch or train.global_batch"
            )
        if self.cluster.gpus_per_node and self.cluster.gpus_per_node != self.cluster.tasks_per_node:
            raise ValueError("cluster.tasks_per_node must equal cluster.gpus_per_node: one process per GPU")
        if self.traits.phases:
            self._check_orders()
        if self.train.fp8:
            self._check_fp8()
        return self

    def _check_fp8(self) -> None:
        model, parts = self.model, self.parallel.tensor
        sizes = {
            "model.hidden": model.hidden,
            "model.length": model.length // (parts if self.parallel.sequence else 1),
            "model.ffn / parallel.tensor": model.ffn_width // parts,
            "heads x width / parallel.tensor": model.hidden // parts,
            "2 x key heads x width / parallel.tensor": 2 * model.key_heads * model.head_dim // parts,
        }
        for name, size in sizes.items():
            if size % 16:
                raise ValueError(f"train.fp8 needs products of multiples of 16, but {name} = {size}")

    def _check_orders(self) -> None:
        model = self.model
        if self.orders.rho > model.length:
            raise ValueError(f"orders.rho = {self.orders.rho} exceeds model.length = {model.length}")
        if self.orders.permutation_steps > self.train.steps:
            raise ValueError(
                f"orders.permutation_steps = {self.orders.permutation_steps} exceeds train.steps = {self.train.steps}"
            )

    def _check_layout(self) -> None:
        processes, tensor, parallel = self.cluster.processes, self.parallel.tensor, self.parallel
        if processes % (tensor * parallel.pipeline):
            stages = f" x parallel.pipeline = {parallel.pipeline}" if parallel.pipeline > 1 else ""
            raise ValueError(
                f"{processes} processes (cluster.nodes x cluster.tasks_per_node) cannot be split into "
                f"groups of parallel.tensor = {tensor}{stages}; choose a divisor of {processes}"
            )
        if parallel.pipeline > 1 and parallel.zero > 1:
            raise ValueError(
                f"parallel.zero = {parallel.zero} with parallel.pipeline = {parallel.pipeline}: ZeRO-2 "
                "keeps whole gradients until the last micro-batch there and saves nothing, ZeRO-3 waits for ranks of "
                "other stages for ever; "
                "nearest layouts: parallel.zero = 1 with these stages, or parallel.pipeline = 1"
            )
        if parallel.zero == 0 and self.train.dtype == "bfloat16":
            raise ValueError(
                "parallel.zero = 0 keeps no float32 master weights for train.dtype = bfloat16; "
                "nearest layouts: parallel.zero = 1, or train.dtype = float32"
            )
        if parallel.chunks > 1 and parallel.pipeline == 1:
            raise ValueError(f"parallel.chunks = {parallel.chunks} needs parallel.pipeline of at least 2")
        runs = parallel.pipeline * parallel.chunks
        if runs > self.model.layers:
            raise ValueError(
                f"model.layers = {self.model.layers} cannot fill parallel.pipeline x parallel.chunks = {runs} runs"
            )
        cut = parallel.cut
        if cut is not None and (
            len(cut) != runs - 1 or sorted(set(cut)) != cut or not all(0 < at < self.model.layers for at in cut)
        ):
            raise ValueError(
                f"parallel.cut = {cut} must be {runs - 1} growing layer numbers between 1 and {self.model.layers - 1}"
            )


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and dotted overrides into a checked configuration; ``UserError`` on anything wrong."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}; see configs/ for examples")
    try:
        tree: Any = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree) or not tree:
            raise UserError(f"{path} is not a configuration: it must hold `section:` and `field: value` lines")
        for override in overrides:
            if "=" not in override or override.startswith("="):
                raise UserError(f"override '{override}' is not of the form section.field=value")
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
        # Not resolved: a "${...}" in a prompt or a path is text.
        values = OmegaConf.to_container(tree, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from error


def load_run(run: RunDirectory) -> RunConfig:
    """The resolved configuration of a run directory; ``UserError`` when it is no run directory."""
    if not run.exists():
        raise UserError(f"{run.path} is not a run directory: it has no {run.config_path.name}")
    return load(run.config_path).model_copy(update={"run_dir": str(run.path)})


def save(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    write_atomically(Path(path), yaml.safe_dump(config.model_dump(), sort_keys=False))


def with_vocabulary(config: RunConfig, vocab_size: int, bos_id: int) -> RunConfig:
    """The configuration with the vocabulary of its data set filled in; ``UserError`` when they disagree."""
    for name, value in (("vocab_size", vocab_size), ("bos_id", bos_id)):
        wanted = getattr(config.model, name)
        if wanted not in (None, value):
            raise UserError(
                f"model.{name} is {wanted} in the configuration but {value} in the data set "
                f"{config.data_directory}; remove the field or use the data set it was made for"
            )
    model = config.model.model_copy(update={"vocab_size": vocab_size, "bos_id": bos_id})
    return config.model_copy(update={"model": model})


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error as one line, with the nearest valid name for an unknown key."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = ".".join(location)
    if first["type"] == "extra_forbidden":
        near = _nearest(location)
        return f"unknown key '{where}'; did you mean '{near}'?"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} = {first['input']!r}: {message[0].lower()}{message[1:]}"


def identity(config: RunConfig) -> dict[str, Any]:
    """What the state of a run was made with and must not change when it goes on."""
    values = config.model_dump()
    values["model"].pop("vocab_size")  # these two follow from the data
    values["model"].pop("bos_id")
    for name in ("directory", "verify", "workers", "jobs", "max_bad_fraction", "skip_steps", "damaged_shards"):
        values["data"].pop(name)
    return {
        **{name: values[name] for name in ("objective", "seed", "model", "data")},
        **{f"train.{name}": values["train"][name] for name in ("global_batch", "dtype", "fp8")},
    }


def _nearest(location: list[str]) -> str:
    """The valid name that an unknown key most likely means: the same word elsewhere, or one spelt alike."""
    *sections, word = location
    every = _all_names(RunConfig)
    elsewhere = [name for name in every if name.rpartition(".")[2] == word]
    if elsewhere:
        return elsewhere[0]
    section: type[BaseModel] = RunConfig
    for part in sections:
        section = _section_of(section.model_fields[part].annotation) or section
    siblings = difflib.get_close_matches(word, section.model_fields, n=1, cutoff=0.5)
    if siblings:
        return ".".join([*sections, siblings[0]])
    return difflib.get_close_matches(".".join(location), every, n=1, cutoff=0.0)[0]


def _section_of(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, types.UnionType):
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _all_names(section: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        names += _all_names(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return names
