"""The one typed run configuration.

- ``RunConfig`` and its parts: every field is documented where it is defined, and nothing else configures a run.
  docs/reference/configuration.md is generated from it (``armd_scale.config_reference``).
- ``identity``: what must stay the same when a run resumes; ``with_vocabulary``: what its data set adds.
- ``config_files`` reads and writes configurations.

Fields marked [D] are decisions of this project where the paper is silent; docs/explanation/decisions.md gives the
reasons.
"""

import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from armd_scale import config_syntax
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from armd_scale.traits import DEFAULT, TRAITS, Traits


def _known_objective(name: str) -> str:
    if name not in TRAITS:
        raise ValueError(f"there is no objective '{name}': choose from {', '.join(TRAITS)}")
    return name


Objective = Annotated[str, AfterValidator(_known_objective)]
MOST = 10**9
"""Largest value of a ``Positive``."""
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Width = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
TRAINING_ONLY = "training only"
"""Marks a field of ``ModelConfig`` that the exported model does not need."""


def _leaves(annotation: Any) -> set[Any]:
    """The types that an annotation is composed of."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (Annotated, Literal):
        arguments = arguments[:1] if typing.get_origin(annotation) is Annotated else ()
    return {leaf for argument in arguments for leaf in _leaves(argument)} or {annotation}


class Section(BaseModel):
    """Part of a configuration file. Fields are typed and documented; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_as_declared(cls, value: Any, info: ValidationInfo) -> Any:
        """Numbers in fields of text are the text that the file spells; switches take ``yes`` and ``off`` too."""
        assert info.field_name
        declared = _leaves(cls.model_fields[info.field_name].annotation)
        if declared <= {str, types.NoneType}:
            return config_syntax.as_written(value)
        return _SWITCHES.get(value.lower(), value) if bool in declared and isinstance(value, str) else value


class PrefixConfig(Section):
    """Prefix aggregation, the seed of the G stream (paper section 3.2)."""

    kernel: Literal["gaussian", "sinusoid", "learned"] = "gaussian"
    """Position embeddings. ``gaussian``: sines and cosines at normal quantiles, whose inner product is about
    exp(-distance^2 / (2 width^2)) [D]; ``sinusoid``: the 10000-base table; ``learned``: a trained table."""
    width: Width | Annotated[list[Width], Field(min_length=1)] = [1.0, 3.0, 8.0]
    """Standard deviation of the Gaussian kernel in tokens, sigma; a list: one kernel for each, and their sum [D]."""
    gate: float | None = 0.1
    """Initial value of a learned factor for each channel of the sum of each kernel; null: no factor, as in the paper
    [D]."""
    neighbour: bool = True
    """Adds the embedding of the token before the target to its seed, where it is visible. With ``gate=0.0`` and
    ``place=before`` the network is then, left to right, a transformer with the same weights [D]."""
    place: Literal["target", "before"] = "before"
    """Position of a row of G in the rotary embedding: that of its target, as in the paper, or the one before [D]."""
    dim: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Size of a position embedding, d_pe; null: ``model.hidden``. A larger size reduces the ripple of the Gaussian
    kernel far from the target; the decoding state has d_pe x hidden entries [D]."""
    scale: Literal["none", "sqrt", "mean"] = "none"
    """Divides the prefix sum by 1, by the square root of the prefix size, or by the prefix size [D]."""
    target_position: bool = False
    """Adds a learned projection of the position embedding of the target [D]."""

    @property
    def widths(self) -> tuple[float, ...]:
        """Widths of the kernels."""
        return tuple(self.width) if isinstance(self.width, list) else (self.width,)

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        if len(self.widths) > 1 and (self.kernel != "gaussian" or self.target_position):
            raise ValueError(
                f"several widths ({self.width}) need kernel=gaussian and target_position=false: set width=2.0"
            )
        return self


FORMER_PREFIX = {"neighbour": False, "gate": None, "place": "target"}
"""Fields of ``model.prefix`` of a run that began before these fields existed."""


class RopeConfig(Section):
    """Scaling of the rotary frequencies, as pretrained models of long texts have it."""

    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """``linear``: all frequencies divided by ``factor``; ``llama3``, ``yarn``: only those that make few turns within
    ``original_length``."""
    factor: Annotated[float, Field(gt=0.0)] = 1.0
    """Divisor of the frequencies."""
    original_length: Positive = 8192
    """Length that the frequencies were made for."""
    low_turns: Annotated[float, Field(gt=0.0)] = 1.0
    """Frequencies with at most this many turns within ``original_length`` are divided (``beta_slow`` of yarn)."""
    high_turns: Annotated[float, Field(gt=0.0)] = 4.0
    """Frequencies with at least this many turns stay (``beta_fast`` of yarn, often 32)."""
    attention: Annotated[float, Field(gt=0.0)] | None = None
    """``yarn``: factor of queries and keys; null: 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        if self.low_turns >= self.high_turns:
            raise ValueError(f"low_turns ({self.low_turns}) must be below high_turns ({self.high_turns})")
        return self


class AdapterConfig(Section):
    """Weights that draft rows alone have, so that they change no law of one token a block [D]."""

    rank: Count = 0
    """Rank of additions to the linears of draft rows: queries, output of attention, and both of the MLP. Draft rows
    then also have a seed and, with ``prefix.gate``, gates of their own; 0: none."""


class ModelConfig(Section):
    """The network (docs/explanation/model.md)."""

    objective: Annotated[Objective, Field(exclude=True)] = DEFAULT
    """Copy of the ``objective`` of the run, filled in by ``RunConfig``: it determines the streams and their masks."""
    layers: Positive = 12
    """Transformer layers, L."""
    hidden: Positive = 768
    """Width of the residual stream, d."""
    heads: Positive = 12
    """Query heads."""
    kv_heads: Positive | None = None
    """Key and value heads (grouped-query attention); null: as many as query heads."""
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Width of a head, D; null: hidden / heads."""
    ffn: Positive | None = None
    """Inner width of the MLP; null: 4 x hidden for gelu, 8/3 x hidden rounded up to a multiple of 128 for swiglu."""
    length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a sequence without BOS, N; also the length of a packed sample."""
    two_stream_layers: Positive | None = None
    """Number of two-stream layers, the first layers of the network; null: half of the layers, as in the paper. Only for
    objectives with two streams."""
    target_mlp: bool = True
    """Whether the G stream passes through the MLP of two-stream layers; in the last two-stream layer it always does
    [D]."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, MLP and head, with a scale and without a bias [D]."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the MLP."""
    tied_head: bool = True
    """Uses the token embedding as the output projection."""
    rope_base: Annotated[float, Field(gt=1.0)] = 10000.0
    """Base of the rotary frequencies; positions are always original positions [D]."""
    rope: RopeConfig = RopeConfig()
    """Scaling of the rotary frequencies."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the variance in every normalisation."""
    qk_norm: bool = False
    """RMSNorm of each query and key head before the rotary embedding (as in Qwen3)."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (as in Qwen2)."""
    init_std: Annotated[float, Field(gt=0.0), TRAINING_ONLY] = 0.02
    """Standard deviation of initial weights; that of projections into the residual stream is smaller by
    sqrt(2 layers) [D]."""
    vocab_size: Positive | None = None
    """Size of the vocabulary; null: read from the index of the data set."""
    bos_id: Count | None = None
    """Token id at position 0; null: read from the index of the data set."""
    prefix: PrefixConfig = PrefixConfig()
    """Prefix aggregation."""
    adapter: AdapterConfig = AdapterConfig()
    """Weights of draft rows."""

    @property
    def traits(self) -> Traits:
        """Traits of the objective."""
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
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def prefix_dim(self) -> int:
        return self.prefix.dim or self.hidden

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table: the vocabulary rounded up to a multiple of 128 under every layout."""
        return -(-self.symbols // 128) * 128

    @property
    def streams(self) -> int:
        """Largest number of streams."""
        return 2 if self.two_stream else 1

    @property
    def symbols(self) -> int:
        """Entries of the vocabulary, and the mask token if the objective has one."""
        assert self.vocab_size is not None
        return self.vocab_size + self.traits.mask

    def exported(self) -> dict[str, Any]:
        """Fields of the standalone model, with nulls filled in; fields of ``prefix`` have the prefix ``prefix_``."""
        names = [name for name, field in type(self).model_fields.items() if TRAINING_ONLY not in field.metadata]
        values = {name: getattr(self, name) for name in names if name not in ("prefix", "rope", "adapter")}
        resolved = {
            "head_dim": self.head_size,
            "rope": self.rope.model_dump() if self.rope.scaling != "none" else {},
            "kv_heads": self.key_heads,
            "ffn": self.ffn_width,
            "two_stream_layers": self.two_stream,
            "prefix_dim": self.prefix_dim,
            "prefix_gate": self.prefix.gate is not None,
            "adapter_rank": self.adapter.rank,
        }
        return values | {f"prefix_{name}": value for name, value in self.prefix.model_dump().items()} | resolved

    @model_validator(mode="after")
    def _fits(self) -> typing.Self:
        if self.head_dim is None and self.hidden % (2 * self.heads):
            raise ValueError(f"hidden ({self.hidden}) must be an even multiple of heads ({self.heads})")
        if self.heads % self.key_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.key_heads})")
        if self.two_stream > self.layers:
            raise ValueError(f"two_stream_layers ({self.two_stream}) exceeds layers ({self.layers})")
        return self


class OrderConfig(Section):
    """Training phases of ``armd``: left to right, progressive permutation, strided fine-tuning (paper sections 3.4
    and 4). Objectives without phases ignore this section."""

    ar_steps: Count = 9_000
    """Steps of the left-to-right phase, i_AR."""
    permutation_steps: Count = 48_000
    """Step at which the number of shuffled tokens reaches ``rho``, i_perm."""
    rho: Count = 32
    """Tokens shuffled in each sequence from i_perm on; ``model.length`` for fully random orders."""
    shuffle: Literal["scattered", "window"] = "scattered"
    """Shuffled tokens: ``scattered``, drawn from the whole sequence, or ``window``, consecutive tokens [D]."""
    strided_steps: Count = 0
    """Steps of strided fine-tuning after the base training, i_SBP."""
    streams: list[Positive] = [1, 2, 4]
    """Each step of strided fine-tuning draws its number of streams from this list."""
    left_to_right_share: Fraction = 0.0
    """Share of the steps after ``ar_steps`` that stay left to right."""
    groups: list[Annotated[int, Field(ge=2)]] = []
    """Sizes of contiguous groups: blocks of so many neighbours, left to right. Each step in groups draws one."""
    group_share: Fraction = 0.0
    """Share of the steps from ``permutation_steps`` to the end of the base training that are in groups."""
    group_decay: Annotated[float, Field(gt=0.0)] | None = None
    """Weight of the losses of a group: exp(-place / ``group_decay``) at places 0, 1, ..., with mean 1; null: 1."""
    drafts: Count = 0
    """Adds draft rows to steps with one token a block, as exact parallel decoding uses them: beside each target row,
    a row that knows as much and predicts a token 1 to ``drafts`` places later; 0: none [D]."""
    draft_weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Weight of the mean loss of the draft rows."""
    draft_target: Literal["token", "law"] = "token"
    """What draft rows learn: ``token``, the NLL of the token of the text; ``law``, the divergence from the law of the
    target row that predicts the same token, which later accepts or refuses the draft [D]."""

    @model_validator(mode="after")
    def _grows(self) -> typing.Self:
        if self.permutation_steps < self.ar_steps:
            raise ValueError(
                f"permutation_steps ({self.permutation_steps}) must not come before ar_steps ({self.ar_steps})"
            )
        if self.strided_steps and not self.streams:
            raise ValueError("strided_steps needs at least one number in streams")
        if self.group_share and not self.groups:
            raise ValueError("group_share needs at least one size in groups")
        if self.left_to_right_share + self.group_share > 1:
            raise ValueError(
                f"left_to_right_share ({self.left_to_right_share}) and group_share ({self.group_share}) exceed 1"
            )
        return self


class DiffusionConfig(Section):
    """Noise of ``mdm`` (MDLM, arXiv 2406.07524) and of ``card`` (CARD, arXiv 2601.22031)."""

    loss_form: Literal["time", "any-order"] = "any-order"
    """Loss of ``mdm``. ``time`` masks each token with probability t and weights the loss by 1 / t (MDLM; RADD with t
    for lambda); some steps have a very large loss, so use it with ``train.spike_nats=null``. ``any-order`` masks k
    tokens for a uniform k and weights the loss by N / k, so that the loss of a text does not exceed the mean NLL of its
    masked tokens. Both have the same expectation (RADD, arXiv 2406.03736) [D]."""
    tail: Annotated[float, Field(ge=1.0)] = 1.5
    """``card``: k = max(1, floor(N t)) masks at time t are drawn from the last ``tail`` x k positions of a text; lambda
    in the paper."""
    beta: Annotated[float, Field(gt=0.0)] = 1.0
    """``card``: a token whose context is clean has the weight 1 / beta."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """``card``: rate at which the effect of a mask on the weights of later tokens decays; p in the paper."""


class MixtureConfig(Section):
    """An additional prepared data set of a mixture."""

    directory: str
    """Its directory, prepared with the same tokenizer and length."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Weight in the mixture, relative to ``data.weight``."""


class DataConfig(Section):
    """Text, tokenizer and shards."""

    directory: str | None = None
    """Directory of the tokenizer and the shards; null: ``data`` in the run directory. Runs can share it."""
    text: list[str] = ["builtin:python"]
    """Files, directories, globs or URLs of text (txt, jsonl, json, parquet, tar; compressed with gz, zst, bz2 or xz),
    or ``builtin:python``: the language reference and the docstrings of the Python installation."""
    txt_document: Annotated[str, Field(min_length=1)] = "file"
    """A document of a txt file: the whole ``file``, a ``line``, a ``paragraph`` (a blank line ends it), or the text
    between separators: any other value is the separator, such as ``<|endoftext|>``."""
    text_field: str = "text"
    """Field of a jsonl record, or parquet column, that holds the text."""
    messages_field: str | None = None
    """Field or column that holds a conversation in place of ``text_field``: a list of messages with ``role`` and
    ``content``. The chat template of the tokenizer writes it, and what the assistant says counts in the loss."""
    prompt_field: str | None = None
    """Field or column that holds what stands before the text of ``text_field``, such as a question, and does not count
    in the loss."""
    id_field: str = "id"
    """Field or column that holds the id of a document, if there is one."""
    source_field: str = "source"
    """Field or column that names the source of a document; without it, the source is the name of the file."""
    heldout_text: list[str] = []
    """Validation text; empty: ``heldout_fraction`` of the documents of ``text``, selected by their hash."""
    heldout_fraction: Fraction = 0.02
    """Share of the text held out when ``heldout_text`` is empty. Of a few large documents, such as a single file, the
    last part of each document is held out."""
    check_text: Literal["size", "mtime", "sha256"] = "mtime"
    """How a change of the text files after the preparation is noticed: size alone, size and time of modification, or
    content. With ``sha256`` the files are read once more at every start."""
    tokenizer: str | None = None
    """A sentencepiece ``.model`` file, a ``tokenizer.json``, or a directory with one of them; null: that of an imported
    model, else sentencepiece trained on ``text``."""
    bos_token: str | None = None
    """Token at the begin of a text; null: as ``tokenizer_config.json`` or ``special_tokens_map.json`` beside the
    tokenizer says, or EOS if the tokenizer has none."""
    eos_token: str | None = None
    """Token at the end of a text; null: as ``tokenizer_config.json`` or ``special_tokens_map.json`` says."""
    vocab_size: Positive = 4096
    """Vocabulary size of a tokenizer that is trained on ``text``."""
    documents: Literal["joined", "separate"] = "joined"
    """Documents of a packed sample: ``joined`` to one sequence, or ``separate`` sequences, each with positions, BOS and
    order of its own, that do not see each other. Applies to validation too."""
    pack: Literal["stream", "best-fit"] = "stream"
    """How documents are put into samples: cut from a ``stream`` of all documents, without loss, or ``best-fit``, which
    cuts only documents that are longer than a sample and pads samples with tokens that do not count in the loss."""
    samples_per_shard: Positive = 8192
    """Packed samples in one WebDataset shard."""
    min_characters: Count = 0
    """Shorter documents are excluded and counted."""
    max_characters: Positive | None = None
    """Longer documents are excluded and counted; null: no limit."""
    deduplicate: bool = False
    """Excludes documents with the same text as an earlier or a held-out document."""
    max_bad_fraction: Fraction = 0.01
    """Largest accepted share of unreadable records; they are counted and listed in ``bad.jsonl``."""
    skip_steps: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []
    """Ranges [first, last) of steps whose samples are left out, for example after a loss spike. Ranges are increasing;
    steps are numbered as in a run that leaves nothing out. Ranges ahead of the current step can be changed."""
    workers: Positive | None = None
    """Processes that prepare the data in a job; null: one for each core of the job."""
    jobs: Positive = 1
    """Size of the job array that prepares the data; more than 1 is useful from about 10 GB of text."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Weight of this data set in a mixture."""
    mixture: list[MixtureConfig] = []
    """Additional prepared data sets to train on; validation uses the text of this data set alone."""
    verify: bool = True
    """Verifies the SHA-256 of every shard when a run starts or resumes."""
    damaged_shards: Literal["stop", "leave_out"] = "stop"
    """Reaction to a damaged or missing training shard: stop the run, or continue without its samples."""

    @model_validator(mode="after")
    def _one_kind(self) -> typing.Self:
        if self.messages_field and self.prompt_field:
            raise ValueError("messages_field and prompt_field cannot both be set: a record is one of the two")
        return self

    @model_validator(mode="after")
    def _grows(self) -> typing.Self:
        edges = [edge for pair in self.skip_steps for edge in pair]
        if sorted(set(edges)) != edges:
            raise ValueError(f"skip_steps = {self.skip_steps} must be growing ranges [first, last) that do not touch")
        return self


class OptimizerConfig(Section):
    """AdamW with warm-up and an exponential moving average of the weights (defaults: the settings of SEDD)."""

    lr: Annotated[float, Field(gt=0.0)] = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """Learning rate after the warm-up. ``wsd``: stable, then a linear decay over ``decay_steps``."""
    warmup_steps: Count = 2_500
    """Steps of linear warm-up from 0."""
    decay_steps: Positive | None = None
    """Last steps of the run, in which the learning rate of ``wsd`` decays; null: a tenth of the steps."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Learning rate at the end of the cosine or of the decay, relative to the peak."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of matrices."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest global gradient norm."""
    ema: Fraction = 0.9999
    """Decay of the moving average of the weights, which is evaluated and exported; 0: no average."""


class TrainConfig(Section):
    """Training loop."""

    steps: Positive = 400_000
    """Steps of the base training; ``orders.strided_steps`` are additional."""
    schedule_from: Positive | None = None
    """Step of a checkpoint from which a changed number of steps may change the phase or the learning rate; null: such
    a change is refused."""
    global_batch: Positive = 512
    """Sequences of an optimiser step over all ranks and micro-batches."""
    micro_batch: Positive = 8
    """Sequences of one forward pass of a rank."""
    head_batch: Positive | None = None
    """Sequences of a micro-batch whose logits are in memory at a time; the logits are recomputed in the backward pass.
    null: all sequences, without recomputation."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations. Master weights and moments are float32. Gradients are accumulated in float32,
    except over the micro-batches of ZeRO-2 and 3."""
    fp8: bool = False
    """Computes the linears of the layers in FP8 with one scale per tensor: e4m3 forward, e5m2 for gradients. CUDA uses
    TransformerEngine; a CPU emulates the rounding, which shows the effect on the loss and is slower."""
    attention: Literal["measured", "flash", "cudnn", "FA3", "FA4"] = "measured"
    """Kernel of attention without a block mask. ``measured``: on CUDA the fastest kernel for the shapes of the run,
    measured at its start; on a CPU the choice of PyTorch. FA3 and FA4 need FlashAttention-3 or 4."""
    log_every: Positive = 10
    """Steps between two records of ``metrics.jsonl``."""
    eval_every: Positive = 1_000
    """Steps between two held-out evaluations."""
    eval_samples: Positive = 512
    """Held-out samples of an evaluation during training."""
    eval_streams: Positive = 4
    """Streams of the strided order in an evaluation during training."""
    checkpoint_every: Positive = 1_000
    """Steps between two checkpoints."""
    keep_checkpoints: Positive = 2
    """Number of checkpoints to keep, the newest."""
    keep_every: Positive | None = None
    """Also keep the checkpoints whose step is a multiple of this number; null: keep only the newest."""
    distill: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of a second loss of runs that begin with ``armd import``: KL(imported model || model) of each token in
    nats, in steps whose rows go left to right, in groups too. The imported model is read from checkpoint 0, which is
    kept [D]."""
    freeze: bool = False
    """Trains the weights of ``model.adapter`` alone: all others, and with them every law of one token a block, stay as
    they are."""
    spike_nats: Annotated[float, Field(gt=0.0)] | None = 3.0
    """A step is skipped if its loss exceeds the median of the last 64 applied steps by more than this; null: a step is
    skipped only if its loss or gradient is not finite."""
    max_skipped: Positive = 5
    """Consecutive skipped steps that trigger a rollback to the newest checkpoint; the samples of these steps are left
    out."""
    max_rollbacks: Count = 2
    """Rollbacks of a job before it stops."""
    hang_factor: Annotated[float, Field(gt=1.0)] = 10.0
    """A step is a hang if it takes this many times the median: every rank writes its stack and exits."""
    hang_seconds: Annotated[float, Field(gt=0.0)] = 300.0
    """Shortest time in seconds that counts as a hang."""
    log_samples: bool = False
    """Writes the numbers of all training samples into ``samples/``, one file per rank."""
    profile: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step, as in ``metrics.jsonl``, of a PyTorch profile of CPU and GPU, written into ``profiles/`` as
    a Chrome trace of the first rank of each pipeline stage; null: no profile. A job writes one profile."""

    @model_validator(mode="after")
    def _profiles_some_steps(self) -> typing.Self:
        if self.profile and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile = {self.profile} must be the first and the last step")
        return self


class ParallelConfig(Section):
    """Layout of the processes. The data-parallel size is processes / (tensor x context x pipeline)."""

    tensor: Positive = 1
    """Tensor-parallel size: processes that split each layer."""
    sequence: bool = False
    """Sequence parallelism: splits activations between tensor-parallel layers along the sequence."""
    context: Positive = 1
    """Context-parallel size: processes that share the tokens of each text, for long sequences. ``model.length`` must be
    a multiple of 2 x context, and with ``sequence`` of 2 x context x tensor."""
    pipeline: Positive = 1
    """Pipeline-parallel size: number of pipeline stages."""
    chunks: Positive = 1
    """Virtual stages of each pipeline stage; more than 1 interleaves them: a smaller bubble, more communication."""
    cut: list[Positive] | None = None
    """First layer of each virtual stage but the first, in order; null: minimise the cost of the costliest one."""
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 1 shards master weights, moments and moving average over the data-parallel and
    context-parallel ranks, 2 also gradients, 3 also weights. Pipeline parallelism needs 0 or 1."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of attention, or all of a layer."""

    def describe(self) -> str:
        """The model-parallel part of the layout in words."""
        parts = [f"tensor {self.tensor}" + (" (sequence parallel)" if self.sequence else "")]
        if self.context > 1:
            parts.append(f"context {self.context}")
        if self.pipeline > 1:
            parts.append(f"pipeline {self.pipeline}" + (f" (x {self.chunks}, interleaved)" if self.chunks > 1 else ""))
        return " x ".join(parts)


class ReportConfig(Section):
    """Report on the trained model, and Weights & Biases."""

    heldout_samples: Positive = 256
    """Held-out samples that the exported model scores."""
    generate_streams: Annotated[list[Positive], Field(min_length=1)] = [1, 2, 4]
    """Numbers of streams of the generated texts."""
    prompt: str = ""
    """Prompt of the generated texts."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: ``auto`` is the mode of ``WANDB_MODE``, or without it ``online`` after ``wandb login`` or with
    ``WANDB_API_KEY``, else ``offline``. Offline runs, and those that cannot reach the server, are recorded in the run
    directory."""


class StageConfig(Section):
    """Resources of a job that does not train."""

    cpus: Positive | None = None
    """CPU cores; null: ``cluster.cpus_per_task``."""
    gpus: Count | None = None
    """GPUs; null: none for ``tokenise``; otherwise one if ``cluster.gpus_per_node`` is not 0."""
    memory_gb: Positive | None = None
    """Memory of the node; null: the default of Slurm."""
    timeout_minutes: Positive | None = None
    """Time limit in minutes; null: ``cluster.timeout_minutes``."""
    partition: str | None = None
    """Slurm partition; null: ``cluster.partition``."""


class ClusterConfig(Section):
    """Nodes, processes and Slurm options."""

    nodes: Positive = 1
    """Nodes."""
    tasks_per_node: Positive = 1
    """Processes of a node; one per GPU."""
    cpus_per_task: Positive = 1
    """CPU cores, and threads, of a process."""
    gpus_per_node: Count = 0
    """GPUs of a node; 0: run on the CPU with gloo."""
    timeout_minutes: Positive = 24 * 60
    """Time limit of a Slurm job in minutes."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    memory_gb: Positive | None = None
    """Memory of a node of the training job; null: the default of Slurm."""
    tokenise: StageConfig = StageConfig()
    """Resources of the jobs that prepare the data."""
    export: StageConfig = StageConfig()
    """Resources of the job that exports the model."""
    evaluate: StageConfig = StageConfig()
    """Resources of the job that scores the exported model and writes the report."""
    setup: list[str] = []
    """Shell lines of the batch script before the processes start (modules, conda)."""
    python: str | None = None
    """Command that starts Python in a Slurm job, for example ``apptainer exec --nv image.sif python``; null: the Python
    that submits the job."""
    environment: dict[str, str] = {}
    """Environment variables of the jobs. They override the defaults of ``launchers/jobs.py``; ``PYTHONPATH`` is
    appended to the path of the code."""
    sbatch: dict[str, str | int | bool] = {}
    """Further sbatch options by their long names."""
    warn_seconds: Positive = 180
    """Seconds before the time limit at which a job is signalled, saves a checkpoint and is requeued."""
    max_restarts: Count = 5
    """Restarts of a failed job without a new checkpoint before it stops."""
    backoff_seconds: Annotated[float, Field(ge=0.0)] = 10.0
    """Seconds before the first restart; doubled for each further restart, up to 10 minutes."""

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


class RunConfig(Section):
    """Fields of the whole run, and the sections."""

    name: str = DEFAULT
    """Name of the run."""
    run_dir: str | None = None
    """Run directory; null: ``runs/<name>``. For the ``config.yaml`` of a run directory, that directory."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the initial weights, the data order and the generation orders."""
    objective: Objective = DEFAULT
    """Training objective (docs/explanation/objectives.md). ``armd``: auto-regressive masked diffusion; ``ar``: left to
    right with one causal stream; ``mdm``: absorbing masked diffusion, one bidirectional stream; ``card``:
    causal diffusion, one causal stream, trained on text with a partly masked end."""
    model: ModelConfig = ModelConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Noise of ``mdm`` and ``card``."""
    orders: OrderConfig = OrderConfig()
    """Training phases of ``armd``."""
    data: DataConfig = DataConfig()
    """Text, tokenizer and shards."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, learning rate and moving average."""
    train: TrainConfig = TrainConfig()
    """Training loop."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the processes."""
    report: ReportConfig = ReportConfig()
    """Report on the trained model, and Weights & Biases."""
    cluster: ClusterConfig = ClusterConfig()
    """Nodes, processes and Slurm options."""

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}").expanduser()

    @property
    def run_directory(self) -> RunDirectory:
        """The files of the run in ``directory``."""
        return RunDirectory(self.directory)

    @property
    def data_directory(self) -> Path:
        return Path(self.data.directory).expanduser() if self.data.directory else self.run_directory.data

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer to prepare data with: the one that is named, or that of an imported model."""
        own = self.run_directory.tokenizer
        return self.data.tokenizer or (str(own) if own.is_dir() else None)

    @property
    def total_steps(self) -> int:
        """Steps of the base training and, if the objective has it, of strided fine-tuning."""
        return self.train.steps + (self.orders.strided_steps if self.traits.phases else 0)

    @property
    def traits(self) -> Traits:
        """Traits of the objective."""
        return TRAITS[self.objective]

    @property
    def data_parallel(self) -> int:
        return self.replicas // self.parallel.context

    @property
    def replicas(self) -> int:
        """Processes that hold the same weights: data x context."""
        return self.cluster.processes // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a rank accumulates in a step."""
        return self.train.global_batch // (self.data_parallel * self.train.micro_batch)

    @model_validator(mode="before")
    @classmethod
    def _pass_on_objective(cls, values: Any) -> Any:
        """Copy ``objective`` into the model."""
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
        chunks = 2 * self.parallel.context if self.parallel.context > 1 else 1
        parts = tensor if self.parallel.sequence else 1
        if model.length % (chunks * parts):
            reasons = [f"parallel.context = {self.parallel.context} needs chunks"] if chunks > 1 else []
            reasons += [f"parallel.sequence needs parts for parallel.tensor = {tensor}"] if parts > 1 else []
            raise ValueError(
                f"model.length = {model.length} is not a multiple of {chunks * parts}: {' and '.join(reasons)}"
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
        decay, warmup = self.optimizer.decay_steps or 0, self.optimizer.warmup_steps
        if self.optimizer.schedule == "wsd" and decay + warmup > self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps + optimizer.decay_steps = {decay + warmup} exceed the {self.total_steps} "
                "steps of the run"
            )
        if self.traits.phases:
            self._check_orders()
        if self.model.adapter.rank and self.traits.streams == 1:
            raise ValueError(f"model.adapter.rank = {self.model.adapter.rank}: {self.objective} has no draft rows")
        if self.train.freeze:
            self._check_freeze()
        if self.train.fp8:
            self._check_fp8()
        return self

    def _check_freeze(self) -> None:
        order = self.orders
        if not (self.model.adapter.rank and order.drafts):
            raise ValueError("train.freeze leaves nothing to train: it needs model.adapter.rank and orders.drafts")
        if order.group_share or order.strided_steps:
            raise ValueError(
                "train.freeze has nothing to train in steps without draft rows: it needs orders.group_share = 0 and "
                "orders.strided_steps = 0"
            )

    def _check_fp8(self) -> None:
        model, parts, context = self.model, self.parallel.tensor, self.parallel.context
        sizes = {
            "model.hidden": model.hidden,
            "model.length" + " / parallel.context" * (context > 1): model.length
            // (context * (parts if self.parallel.sequence else 1)),
            "model.ffn / parallel.tensor": model.ffn_width // parts,
            "heads x width / parallel.tensor": model.heads * model.head_size // parts,
            "2 x key heads x width / parallel.tensor": 2 * model.key_heads * model.head_size // parts,
        }
        for name, size in sizes.items():
            if size % 16:
                raise ValueError(f"train.fp8 needs products of multiples of 16, but {name} = {size}")

    def _check_orders(self) -> None:
        model = self.model
        if self.orders.rho > model.length:
            raise ValueError(f"orders.rho = {self.orders.rho} exceeds model.length = {model.length}")
        if self.orders.drafts >= model.length:
            raise ValueError(f"orders.drafts = {self.orders.drafts} must be below model.length = {model.length}")
        if max(self.orders.groups, default=0) > model.length:
            raise ValueError(f"orders.groups = {self.orders.groups} exceeds model.length = {model.length}")
        if self.orders.permutation_steps > self.train.steps:
            raise ValueError(
                f"orders.permutation_steps = {self.orders.permutation_steps} exceeds train.steps = {self.train.steps}"
            )

    def _check_layout(self) -> None:
        processes, tensor, parallel = self.cluster.processes, self.parallel.tensor, self.parallel
        if processes % (tensor * parallel.context * parallel.pipeline):
            stages = f" x parallel.context = {parallel.context}" if parallel.context > 1 else ""
            stages += f" x parallel.pipeline = {parallel.pipeline}" if parallel.pipeline > 1 else ""
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


def with_vocabulary(config: RunConfig, vocab_size: int, bos_id: int) -> RunConfig:
    """The configuration with the vocabulary of its data set filled in; ``UserError`` when they disagree.

    A pretrained model can have more entries than its tokenizer.
    """
    entries, bos = config.model.vocab_size or vocab_size, config.model.bos_id
    for name, wanted, value, fits in (
        ("vocab_size", entries, vocab_size, entries >= vocab_size),
        ("bos_id", bos, bos_id, bos in (None, bos_id)),
    ):
        if not fits:
            raise UserError(
                f"model.{name} is {wanted} in the configuration but {value} in the data set "
                f"{config.data_directory}; remove the field or use the data set it was made for"
            )
    model = config.model.model_copy(update={"vocab_size": entries, "bos_id": bos_id})
    return config.model_copy(update={"model": model})


def identity(config: RunConfig) -> dict[str, Any]:
    """Values that must not change when a run resumes."""
    values = config.model_dump()
    values["model"].pop("vocab_size")  # these two follow from the data
    values["model"].pop("bos_id")
    for name in ("directory", "verify", "workers", "jobs", "max_bad_fraction", "skip_steps", "damaged_shards"):
        values["data"].pop(name)
    return {
        **{name: values[name] for name in ("objective", "seed", "model", "data")},
        **{f"train.{name}": values["train"][name] for name in ("global_batch", "dtype", "fp8")},
    }
