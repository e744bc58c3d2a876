"""Decoding: fill the free positions of texts, several at a time, with caches.

- ``task``, ``strided_blocks``: which positions are written together;
- ``Lockstep``: sequences with the same plan; rows are appended to the caches and need no mask;
- ``Lanes``: sequences that differ in length, plan and settings, and can be replaced at any step. ``Strided`` and
  ``Exact`` are strategies of objectives with exact likelihoods; other strategies are defined in ``objectives/``;
- ``Frontier``: returns tokens in the order of their positions, as the text becomes complete.

A step is one pass: it feeds the tokens just written (rows of X) and predicts the next tokens (rows of G) with one set
of keys, without synchronising with the device. Shapes: B sequences ("lanes"), T targets of a step, M slots, which are
positions 0..M - 1.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from armd_scale.decoding.network import Cache, InputError, Network, Sight
from armd_scale.decoding.sampling import Decoding, Sampler, draw, uniform
from armd_scale.formulas import stream_bounds

FREE = -1
"""Placeholder of a token that is to be generated."""

LOGIT_ROWS = 2048
"""Largest number of rows whose logits exist at the same time."""


class Step(NamedTuple):
    """Output of a step: text positions (from 1; 0 is padding) and their tokens, both [B, T]."""

    positions: Tensor
    tokens: Tensor


@dataclasses.dataclass(frozen=True)
class Task:
    """A text to complete."""

    tokens: list[int]
    """Token of every position, ``FREE`` for positions to generate."""
    order: list[int]
    """Free positions in the order of generation."""
    blocks: list[list[int]]
    """``order`` in blocks that are generated together."""
    key: tuple[int, int]
    """Key of the sequence's own stream of random numbers."""
    decoding: Decoding

    @property
    def given(self) -> list[int]:
        """Positions of the given tokens, ascending."""
        return [position for position, token in enumerate(self.tokens, start=1) if token != FREE]


def task(tokens: list[int], key: tuple[int, int], decoding: Decoding, order: Sequence[int] | None = None) -> Task:
    """Plan a text: by the strategy of its decoding, or one position after another in ``order``.

    Raises ``InputError`` if ``order`` is not a permutation of the free positions.
    """
    free = [position for position, token in enumerate(tokens, start=1) if token == FREE]
    if order is None:
        blocks = STRATEGIES[decoding.strategy].blocks(free, decoding, key)
    else:
        if decoding.streams > 1:
            raise InputError("order and streams exclude each other: leave out streams")
        if sorted(order) != free:
            raise InputError(f"order must name each of the {len(free)} free positions once")
        blocks = [[position] for position in order]
    return Task(tokens, [position for block in blocks for position in block], blocks, key, decoding)


def strided_blocks(free: Sequence[int], streams: int) -> list[list[int]]:
    """Split the n free positions into S contiguous streams; returns the blocks of strided decoding.

    The heads of the streams are generated one at a time, then a block holds the next token of every stream. The first
    ``n % S`` streams are longer by a token, so only the last block can be ragged. ``streams`` is capped at n.
    """
    parts = stream_bounds(len(free), streams)
    heads = [[free[start]] for start, _ in parts]
    rounds = range(1, parts[0][1] - parts[0][0]) if parts else ()
    return heads + [[free[start + step] for start, stop in parts if start + step < stop] for step in rounds]


STRATEGIES: "dict[str, type[Lanes]]" = {}
"""Decoding strategies by the names that ``Decoding.strategy`` returns."""


class Lockstep:
    """Sequences with the same free positions and blocks: every step has the same rows in all sequences."""

    def __init__(self, network: Network, tasks: Sequence[Task]) -> None:
        self._network, device = network, network.device
        first, given = tasks[0], tasks[0].given
        self.blocks = first.blocks
        self._sampler = Sampler(len(tasks), device)
        for lane, task in enumerate(tasks):
            self._sampler.set(lane, task.decoding)
        slots = len(first.tokens) + 1
        draws = torch.stack([uniform(task.key, slots) for task in tasks])
        self._uniform = draws[:, first.order].to(device)
        self._places = torch.tensor([0, *given, *first.order], device=device)
        self._cache = Cache(network, len(tasks), slots)
        self._context = torch.full((len(tasks), 1), network.config.bos_id, device=device)
        self._fed, self._step = 0, 0
        if given:
            known = torch.tensor([[task.tokens[p - 1] for p in given] for task in tasks], device=device)
            at = self._places[None, 1 : len(given) + 1].expand(len(tasks), -1)
            network.prefill(known, at, torch.ones_like(known, dtype=torch.bool), self._cache, None)
            self._context, self._fed = known[:, -1:], len(given)
        self._start = self._fed + 1

    def step(self) -> Step:
        """Write the next block."""
        width = len(self.blocks[self._step])
        fed = self._fed + self._context.shape[1]
        targets = self._places[None, fed : fed + width]
        hidden = self._network.step(self._context, self._places[None, self._fed : fed], targets, self._cache)
        numbers = self._uniform[:, fed - self._start : fed - self._start + width]
        self._context = self._sampler.draw(self._network.predict(hidden), numbers)
        self._fed = fed
        self._step += 1
        return Step(targets.expand(self._context.shape), self._context)


class Lanes:
    """A batch of sequences ("lanes"), each with its own text, plan and settings.

    ``admit`` puts texts into free lanes at any time; ``step`` continues all lanes; ``release`` frees a lane. The text
    of a lane does not depend on other lanes. ``width``: largest number of targets of a step. A subclass is a strategy
    with the ``name`` of ``Decoding.strategy``.
    """

    cached: ClassVar[bool] = True
    """Whether a lane keeps keys and values."""

    def __init_subclass__(cls, name: str) -> None:
        STRATEGIES[name] = cls

    @staticmethod
    def blocks(free: Sequence[int], decoding: Decoding, key: tuple[int, int]) -> list[list[int]]:
        """The free positions of a text in blocks, in the order of generation."""
        return strided_blocks(free, decoding.streams)

    @staticmethod
    def targets(decoding: Decoding) -> int:
        """Number of targets of a step with these settings."""
        return decoding.streams

    def __init__(self, network: Network, count: int, slots: int, width: int) -> None:
        self.network, self.count, self.slots, self.width = network, count, slots, width
        self.cache = Cache(network, count, slots if self.cached else 0)
        self.sampler = Sampler(count, network.device)
        # A scratch slot takes the writes of padding.
        self.text = self._zeros(slots + 1)
        self.known = self._zeros(slots + 1).bool()
        self._free = self._zeros(slots).bool()
        self._length = self._zeros()
        self._ends = self._zeros(network.config.vocab_size).bool()  # tokens that end a text
        self._first_end = self._zeros(1)  # first position at which they may be generated
        self._holds = [False] * count  # whether that is behind the first free position
        self.known[:, 0], self.text[:, 0] = True, network.config.bos_id
        self._graphs: _Graphs | None = None
        if network.device.type == "cuda":
            with torch.cuda.device(network.device):
                self._graphs = _Graphs()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(self.count, *shape, dtype=dtype, device=self.network.device)

    def admit(self, tasks: Mapping[int, Task]) -> None:
        """Assign texts to lanes, replacing their previous texts."""
        rows = max(len(one.given) for one in tasks.values())
        text = torch.zeros(len(tasks), self.slots + 1, dtype=torch.long)
        known, free = torch.zeros_like(text).bool(), torch.zeros_like(text).bool()
        tokens, at = torch.zeros(2, len(tasks), rows, dtype=torch.long)
        text[:, 0], known[:, 0] = self.network.config.bos_id, True
        ends = torch.zeros(len(tasks), self.network.config.vocab_size, dtype=torch.bool)
        first_end = torch.zeros(len(tasks), 1, dtype=torch.long)
        for row, (lane, task) in enumerate(tasks.items()):
            self.sampler.set(lane, task.decoding)
            ends[row, list(task.decoding.ends(self.network.config.eos_id))] = True
            held = sorted(task.order)[: task.decoding.min_tokens]
            first_end[row], self._holds[lane] = max(held, default=0) + 1, bool(held) and task.decoding.stop
            given = torch.tensor(task.given, dtype=torch.long)
            at[row, : len(given)] = given
            tokens[row, : len(given)] = text[row, given] = torch.tensor(task.tokens, dtype=torch.long)[given - 1]
            known[row, given] = True
            free[row, task.order] = True
        device = self.network.device
        lanes = torch.tensor(list(tasks), device=device)
        self.text[lanes], self.known[lanes] = text.to(device), known.to(device)
        self._free[lanes] = free[:, :-1].to(device)
        self._length[lanes] = torch.tensor([len(task.tokens) for task in tasks.values()], device=device)
        self._ends[lanes], self._first_end[lanes] = ends.to(device), first_end.to(device)
        self.cache.clear(lanes)
        if rows and self.cached:
            self.network.prefill(tokens.to(device), at.to(device), (at > 0).to(device), self.cache, lanes)
        for lane, task in tasks.items():
            self._start(lane, task, max(task.given, default=0))

    def release(self, lane: int) -> None:
        """Free a lane; it idles until the next ``admit``."""
        self._length[lane], self._ends[lane], self._holds[lane] = 0, False, False
        self.sampler.set(lane, Decoding())

    def finished(self) -> Tensor:
        """Lanes [B] whose text is complete: every position, or with ``stop`` all positions up to the first end."""
        known = self.known[:, : self.slots]
        complete = known.long().cumprod(dim=1).sum(dim=1) - 1
        position = torch.arange(self.slots, device=known.device)
        ends = known & self._free & self._ends.gather(1, self.text[:, : self.slots])
        first_end = position.where(ends, self.slots).amin(dim=1)
        return (complete >= self._length) | (complete >= first_end)

    def step(self) -> Step:
        """Advance every lane by one pass."""
        return self._run()

    def _run(self, *inputs: Tensor) -> Step:
        """``_advance``, as a CUDA graph on a GPU."""
        if self._graphs is None:
            return Step(*self._advance(*inputs))
        with torch.cuda.device(self.network.device):
            return Step(*self._graphs.run(self._advance, inputs, self._kind()))

    def _kind(self) -> tuple[Any, ...]:
        """What the operations of a step depend on, beside the shapes of its inputs."""
        return (*self.sampler.kinds, self.sampler.draft, any(self._holds))

    def _start(self, lane: int, one: Task, last: int) -> None:
        """Set up a lane. All given tokens but the token at position ``last`` (0: BOS) are in the cache."""
        raise NotImplementedError

    def _advance(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """A step on the device -> positions and tokens [B, T] written."""
        raise NotImplementedError

    def _predict(self, hidden: Tensor, at: Tensor) -> Tensor:
        """Logits of activations [B, T, d] at positions [B, T]: no text ends before it has ``min_tokens``."""
        logits = self.network.predict(hidden)
        if not any(self._holds):
            return logits
        early = (at < self._first_end)[..., None] & self._ends[:, None]
        return logits.masked_fill(early, float("-inf"))

    def _known_targets(self, targets: Tensor) -> Tensor:
        """Slots [B, M] with rows of G: known positions and ``targets`` [B, T]; slot 0 if there are none."""
        top = self.known.scatter(1, targets, True)[:, : self.slots]
        top[:, 0] = ~top[:, 1:].any(dim=1)
        return top

    def _write(self, positions: Tensor, tokens: Tensor) -> None:
        slot = positions.where(positions > 0, self.slots)
        self.text.scatter_(1, slot, tokens)
        self.known.scatter_(1, slot, True)


class Strided(Lanes, name="strided"):
    """Blocks that are planned in advance."""

    def __init__(self, network: Network, count: int, slots: int, width: int) -> None:
        super().__init__(network, count, slots, width)
        self._uniform = self._zeros(slots, dtype=torch.float64)
        self._blocks: list[list[list[int]]] = [[] for _ in range(count)]
        self._next = [0] * count

    def _start(self, lane: int, task: Task, last: int) -> None:
        self._uniform[lane, : len(task.tokens) + 1] = uniform(task.key, len(task.tokens) + 1).to(self._uniform.device)
        self._blocks[lane], self._next[lane] = [[last], *task.blocks], 1

    def release(self, lane: int) -> None:
        super().release(lane)
        self._blocks[lane] = []

    @property
    def exhausted(self) -> bool:
        """Whether all blocks of all lanes are written."""
        return all(step >= len(blocks) for blocks, step in zip(self._blocks, self._next, strict=True))

    def step(self) -> Step:
        rows = []
        for lane, (blocks, number) in enumerate(zip(self._blocks, self._next, strict=True)):
            left = number < len(blocks)
            rows.append((blocks[number - 1] if left and self.cached else [], blocks[number] if left else []))
            self._next[lane] += left
        fed, wanted = (max(1, *(len(row[side]) for row in rows)) for side in (0, 1))
        if self._graphs is not None:
            fed, wanted = self._graph_sizes(fed, wanted)
        plan = torch.zeros(self.count, fed + wanted, dtype=torch.long)
        plan[:, :fed] = -1
        for lane, (context, targets) in enumerate(rows):
            plan[lane, : len(context)] = torch.tensor(context)
            plan[lane, fed : fed + len(targets)] = torch.tensor(targets)
        plan = plan.to(self.text.device, non_blocking=True)
        return self._run(plan[:, :fed], plan[:, fed:])

    def _graph_sizes(self, fed: int, wanted: int) -> tuple[int, int]:
        """Padded numbers of context rows and targets of a step, so that few CUDA graphs serve all steps."""
        return self.width, self.width

    def _advance(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        at, targets = inputs
        keep, at = at >= 0, at.clamp(min=0)
        seen = self.known[:, None, : self.slots]
        sight = Sight(seen, seen, self._known_targets(targets)[:, None])
        hidden = self.network.step(self.text.gather(1, at), at, targets, self.cache, keep, sight)
        tokens = self.sampler.draw(self._predict(hidden, targets), self._uniform.gather(1, targets))
        self._write(targets, tokens)
        return targets, tokens


class Exact(Lanes, name="exact"):
    """Writes several tokens per pass, with the distribution of a token per step in the same order.

    A pass scores the K drafted tokens. A drafted token is kept with probability min(1, q / p), with its draft
    probability p and its score q. The first token that is not kept is drawn again from max(0, q - p); if all are kept,
    an additional token is drawn from the scores. This is speculative decoding for any generation order (arXiv
    2504.20456), with the model as its own draft model.

    The same pass drafts the next K tokens. For each number a of tokens that can be kept, K draft rows know what the
    score row behind these tokens knows and look 1 to K tokens further ahead; no row sees them (``rows.Drafts``). In the
    order of several streams, a proposal knows the whole draft before it, refused tokens too, which belong to other
    streams: it is a further score row.
    """

    @staticmethod
    def targets(decoding: Decoding) -> int:
        return decoding.drafted

    def __init__(self, network: Network, count: int, slots: int, width: int) -> None:
        super().__init__(network, count, slots, width)
        self._order = self._zeros(slots + 2 * width + 1)
        self._total, self._written = self._zeros(1), self._zeros(1)
        self._last, self._draft, self._pass = self._zeros(1), self._zeros(1), self._zeros(1)
        self._several = self._zeros(1).bool()  # whether a text has several streams
        self._kinds: dict[int, bool] = {}  # the same of every lane with a text
        self._proposal = self._zeros(width, network.config.vocab_size, dtype=network.precise)
        # Uniform numbers of every pass, for the draft and the token after it, and for the acceptance of the draft.
        self._draws = self._zeros(slots + 1, width + 1, dtype=torch.float64)
        self._judge = self._zeros(slots + 1, width, dtype=torch.float64)

    def _start(self, lane: int, task: Task, last: int) -> None:
        device = self._order.device
        size, passes = task.decoding.drafted, len(task.order) + 1
        numbers = uniform(task.key, passes, 2 * size + 1).to(device)
        self._draws[lane, :passes, : size + 1] = numbers[:, : size + 1]
        self._judge[lane, :passes, :size] = numbers[:, size + 1 :]
        self._order[lane] = 0
        self._order[lane, : len(task.order)] = torch.tensor(task.order, dtype=torch.long, device=device)
        self._total[lane], self._written[lane], self._pass[lane] = len(task.order), 0, 0
        self._last[lane], self._draft[lane] = last, size
        self._kinds[lane] = self._several[lane] = task.decoding.streams > 1

    def release(self, lane: int) -> None:
        super().release(lane)
        self._total[lane], self._draft[lane] = 0, 0
        self._kinds.pop(lane, None)

    def _kind(self) -> tuple[Any, ...]:
        return (*super()._kind(), *sorted({*self._kinds.values()}))

    def _advance(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        width, slots = max(1, self.sampler.draft), self.slots
        column = torch.arange(2 * width + 1, device=self.text.device)
        there = (self._written + column < self._total) & (column <= 2 * self._draft)
        positions = self._order.gather(1, self._written + column).where(there, 0)
        drafted = (there & (column < self._draft) & (self._pass > 0))[:, :width]
        now = self._pass[..., None].clamp(max=slots)
        draws = self._draws.gather(1, now.expand(-1, 1, width + 1))[:, 0]
        judge = self._judge.gather(1, now.expand(-1, 1, width))[:, 0]
        proposed = self._proposal[:, :width]

        # Context rows: the last accepted token and the draft. Score row i sees the draft before it, and itself.
        tokens = draw(proposed, draws[:, :width])
        context = torch.cat([self.text.gather(1, self._last), tokens], dim=1)
        at = torch.cat([self._last, positions[:, :width].where(drafted, 0)], dim=1)
        keep = torch.cat([there[:, :1], drafted], dim=1)
        several, single = any(self._kinds.values()), not all(self._kinds.values())
        scored = column if several else column[: width + 1]
        rank = torch.full_like(self.text, len(column))
        rank.scatter_(1, positions[:, :width].where(drafted, slots), column[:width].expand(self.count, -1))
        rank = rank[:, None, :slots]
        seen, top = self.known[:, None, :slots], self.known[:, None, :slots].clone()
        top[..., 0] = False
        targets = positions[:, : len(scored)]
        own = targets[..., None] == torch.arange(slots, device=positions.device)
        before = rank < scored[:, None]
        sight = Sight((seen | before)[:, : width + 1], seen | before, top | before | own)
        earlier = (column[: width + 1] <= scored[:, None]) & keep[:, None]
        ahead = column[1 : width + 1]
        if single:
            # Draft rows with the knowledge of score row a, for every a.
            after = column[: width + 1].repeat_interleave(width)
            rows = torch.cat([scored, after])
            targets = torch.cat([targets, positions[:, after + ahead.repeat(width + 1)]], dim=1)
            sight = Sight(sight.x, (seen | before)[:, rows], (top | before | own)[:, rows])
            earlier = earlier[:, rows]
        hidden = self.network.step(context, at, targets, self.cache, keep, sight, earlier, keyed=len(scored))
        score = self.sampler.probabilities(self._predict(hidden[:, : width + 1], targets[:, : width + 1]))

        # Accept drafted tokens, and draw the next token.
        p, q = (rows.gather(-1, tokens[..., None])[..., 0] for rows in (proposed, score[:, :width]))
        kept = (drafted & accept(p, q, judge)).long().cumprod(dim=1).bool()
        accepted = kept.sum(dim=1, keepdim=True)
        vocab = (-1, -1, score.shape[-1])
        inside = accepted.clamp(max=width - 1)
        refused = drafted.gather(1, inside) & (accepted < width)
        fresh = score.gather(1, accepted[..., None].expand(vocab))
        old = proposed.gather(1, inside[..., None].expand(vocab))
        more = draw(self._rest(fresh, old, refused[..., None]), draws.gather(1, self._draft))
        self.network.absorb(context, at, torch.cat([there[:, :1], kept], dim=1), self.cache)

        following = accepted + ahead
        drafts = following  # rows of the next draft
        if single:
            drafts = torch.where(self._several, following, len(scored) + accepted * width + ahead - 1)
        chosen = hidden.gather(1, drafts[..., None].expand(-1, -1, hidden.shape[-1]))
        proposal = self.sampler.probabilities(self._predict(chosen, positions.gather(1, following)))
        proposed.copy_(proposal.where(there.gather(1, following)[..., None], 0))
        tokens = torch.cat([tokens, more], dim=1).scatter(1, accepted, more)
        chosen = torch.cat([kept, torch.zeros_like(refused)], dim=1).scatter(1, accepted, there.gather(1, accepted))
        positions = positions[:, : width + 1].where(chosen, 0)
        self._write(positions, tokens)
        self._last.copy_(positions.gather(1, accepted))
        self._written += chosen.sum(dim=1, keepdim=True)
        self._pass += 1
        return positions, tokens

    @staticmethod
    def _rest(score: Tensor, draft: Tensor, refused: Tensor) -> Tensor:
        """Distribution of the token behind the accepted ones: the score, minus the draft if it was refused."""
        rest = (score - draft).clamp(min=0)
        # If score and draft differ by rounding alone, nothing is left to draw from.
        return torch.where(refused & (rest.sum(-1, keepdim=True) > 0), rest, score)


def accept(p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
    """Whether tokens of draft probability p and score q are accepted: with probability min(1, q / p)."""
    return uniform * p < q


class Frontier:
    """A text whose tokens arrive in any order: returns them by position, as far as the text is complete."""

    def __init__(self, task: Task, eos_id: int) -> None:
        self.tokens = list(task.tokens)
        self.passed = 0
        """Number of positions returned."""
        self.ended = False
        self.stopped = False
        """Whether the text ended at EOS or another token that ends it."""
        self._free = set(task.order)
        self._ends = task.decoding.ends(eos_id)
        self.push([], [])

    def push(self, positions: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Add a step's tokens; returns the generated tokens that are now complete, without the token that ends it."""
        for position, token in zip(positions, tokens, strict=True):
            if position:
                self.tokens[position - 1] = token
        fresh = []
        while not self.ended and self.passed < len(self.tokens) and self.tokens[self.passed] != FREE:
            token = self.tokens[self.passed]
            self.passed += 1
            if self.passed in self._free:
                self.ended = self.stopped = token in self._ends
                fresh += [] if self.stopped else [token]
        self.ended = self.ended or self.passed == len(self.tokens)
        return fresh


class _Graphs:
    """Functions of tensors that change other state in place, as CUDA graphs, one per kind of call.

    The first call of a kind runs eagerly and initialises libraries, the second call is captured, later calls replay.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, Tensor]] | None] = {}
        self._stream = torch.cuda.Stream()

    def run(
        self, work: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], kind: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        """``work(*inputs)``; ``kind``: settings that the graph depends on."""
        kind = (tuple(tensor.shape for tensor in inputs), *kind)
        if kind not in self._kept:
            self._kept[kind] = None
            return work(*inputs)
        entry = self._kept[kind]
        if entry is None:
            graph, held = torch.cuda.CUDAGraph(), tuple(tensor.clone() for tensor in inputs)
            with torch.cuda.graph(graph, stream=self._stream):
                results = work(*held)
            entry = self._kept[kind] = (graph, held, results)
        graph, held, results = entry
        for tensor, value in zip(held, inputs, strict=True):
            tensor.copy_(value)
        graph.replay()
        positions, tokens = results
        return positions.clone(), tokens.clone()
