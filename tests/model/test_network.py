"""The training network on Megatron-Core layers against the float64 reference, and its cut into stages."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import orders
from armd_scale.config import ModelConfig, ParallelConfig, PrefixConfig
from armd_scale.model.flops import (
    balanced_cuts,
    embedding_macs,
    head_macs,
    layer_macs,
    training_flops_per_token,
)
from armd_scale.model.layers import Linears, linears
from armd_scale.model.network import Stage, is_adapter, left_to_right
from armd_scale.objectives.card import noised_rows
from armd_scale.orders import Layout
from armd_scale.parallel import groups
from armd_scale.parallel.sharding import initialise
from armd_scale.rows import arrange, corrupt, look_ahead
from armd_scale.training.export import standalone_config
from tests import reference
from tests.conftest import BASELINES, FEATURES, MODELS, PAPER, layouts


def build(config, first=0, last=None, seed=3):
    parallel = groups.transformer_config(config, ParallelConfig(), torch.float32)
    stage = Stage(config, parallel, first, last)
    initialise([stage], seed)
    for name, param in stage.named_parameters():
        if is_adapter(name):  # its additions are zero at the start
            draw = torch.Generator().manual_seed(len(name) + 1000 * param.numel())
            torch.nn.init.normal_(param.data, std=0.3, generator=draw)
    return stage


def weights(stage, config):
    out = {name: param.detach() for name, param in stage.named_parameters()}
    return {n: t[: config.symbols] if n in ("embedding.weight", "head.weight") else t for n, t in out.items()}


def expected_laws(stage, config, tokens, layout, drafts=None):
    """Log-probabilities by the reference with the weights of a stage."""
    shape = standalone_config(config, eos_id=2)
    rows = tokens.tolist(), layout.order.tolist(), layout.block_ids.tolist()
    return reference.log_probabilities(weights(stage, config), shape, *rows, drafts)


@pytest.mark.one_process
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [16, 11])
def test_equals_the_reference_in_every_layout(kind, length):
    """Losses of every target, in float32 against float64."""
    config = MODELS[kind]
    stage = build(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    for name, layout in layouts(length).items():
        nll = stage(arrange(tokens, layout, config.bos_id)).detach().double()
        for row in range(2):
            logp = expected_laws(stage, config, tokens[row], layout)
            targets = torch.from_numpy(tokens[row][layout.order - 1])[:, None]
            torch.testing.assert_close(nll[row], -logp.gather(1, targets)[:, 0], atol=1e-4, rtol=1e-5, msg=name)


@pytest.mark.one_process
@pytest.mark.parametrize("kind", MODELS)
def test_draft_rows_equal_the_reference(kind):
    """In training and in the standalone model; the other rows do not see them."""
    config, length = MODELS[kind], 11
    stage = build(config)
    random = np.random.default_rng(0)
    tokens, lags = random.integers(0, config.vocab_size, (2, length)), random.integers(1, 4, (2, length))
    for layout in (orders.left_to_right(length), orders.shuffled(length, length, 1)):
        rows = arrange(tokens, layout, config.bos_id)
        planes = stage(look_ahead(rows, lags)).detach().double()
        torch.testing.assert_close(planes[0], stage(rows).detach().double(), atol=1e-5, rtol=1e-5)
        assert not planes[1].any()
        for row in range(2):
            ahead = [(n, n + lag) for n, lag in enumerate(lags[row].tolist()) if n + lag < length]
            drafts = [(n, int(layout.order[index])) for n, index in ahead]
            logp = expected_laws(stage, config, tokens[row], layout, drafts)
            expected = torch.zeros(length, dtype=torch.float64)
            for (n, index), law in zip(ahead, logp, strict=True):
                expected[n] = -law[tokens[row][layout.order[index] - 1]]
            torch.testing.assert_close(planes[2][row], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.one_process
@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_equal_the_reference(kind):
    """One stream: left to right by the shift query, or everything from what is not masked; weights of the NLL too."""
    config = BASELINES[kind]
    stage = build(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 11))
    masked = np.random.default_rng(1).random((2, 11)) < 0.5
    rows = arrange(tokens, orders.left_to_right(11), config.bos_id)
    seen, factors = tokens, torch.ones(2, 11, dtype=torch.float64)
    if config.objective == "mdm":
        rows = corrupt(tokens, masked, np.array([[2.0], [3.0]]), mask_id=config.vocab_size)
        seen = np.where(masked, config.vocab_size, tokens)
        factors = torch.from_numpy(masked * np.array([[2.0], [3.0]]))
    elif config.traits.mask:
        rows, seen = noised_rows(config, tokens, masked), np.where(masked, config.vocab_size, tokens)
    nll = stage(rows).detach().double()
    shape = standalone_config(config, eos_id=2)
    for row in range(2):
        logp = reference.log_probabilities(
            weights(stage, config), shape, seen[row].tolist(), range(1, 12), range(1, 12)
        )
        expected = -logp.gather(1, torch.from_numpy(tokens[row])[:, None])[:, 0] * factors[row]
        torch.testing.assert_close(nll[row], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.one_process
@pytest.mark.parametrize("kind", BASELINES)
def test_stages_of_baselines_in_a_row_are_the_network(kind):
    config = BASELINES[kind]
    whole = build(config)
    stages = [build(config, 0, 1), build(config, 1, config.layers)]
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, (2, 16))
    rows = arrange(tokens, orders.left_to_right(16), 1)
    if config.objective == "mdm":
        rows = corrupt(tokens, tokens % 2 == 0, np.ones((2, 1)), mask_id=config.vocab_size)
    sent = stages[0](rows)
    assert sent.shape == (16, 2, config.hidden)
    stages[1].set_input_tensor([sent])
    assert torch.equal(stages[1](rows), whole(rows))


@pytest.mark.one_process
def test_a_batch_may_mix_orders():
    config = PAPER
    stage = build(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 16))
    each = [orders.left_to_right(16), orders.shuffled(16, 16, 1), orders.shuffled(16, 4, 2)]
    mixed = Layout(*(np.stack(field) for field in zip(*each, strict=True)))
    together = stage(arrange(tokens, mixed, 1))
    for row, layout in enumerate(each):
        alone = stage(arrange(tokens[row : row + 1], layout, 1))
        torch.testing.assert_close(together[row : row + 1], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.one_process
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["random", "strided-4"])
def test_strict_causality_of_the_training_network(kind, layout):
    """Strict causality, bit for bit: a target's loss does not see tokens of its own or a later block."""
    config = MODELS[kind]
    stage = build(config)
    order, blocks = layouts(16)[layout]
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (1, 16))
    before = stage.hidden(arrange(tokens, Layout(order, blocks), 1))
    for changed in range(16):
        other = tokens.copy()
        other[0, order[changed] - 1] = (other[0, order[changed] - 1] + 1) % config.vocab_size
        after = stage.hidden(arrange(other, Layout(order, blocks), 1))
        blind = torch.from_numpy(blocks <= blocks[changed])
        assert torch.equal(before[blind], after[blind])


@pytest.mark.one_process
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cut", [[1], [2], [1, 2]])
@pytest.mark.parametrize("layout", ["random", "strided-2"])
def test_stages_in_a_row_are_the_network(kind, cut, layout):
    """A stage is a run of layers and passes on one tensor; losses and gradients are those of the whole."""
    config = MODELS[kind]
    whole = build(config)
    edges = [0, *cut, config.layers]
    stages = [build(config, a, b) for a, b in itertools.pairwise(edges)]
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, (2, 16))
    rows = arrange(tokens, layouts(16)[layout], 1)
    if rows.visible is None:
        rows = look_ahead(rows, np.full((2, 16), 2))
    sent = None
    for stage in stages:
        stage.set_input_tensor([sent])
        sent = stage(rows)
        if not stage.is_last:
            streams = 2 if int(max(stage.layers, key=int)) < config.two_stream - 1 else 1
            streams += rows.drafts is not None
            assert sent.shape == (16, streams * 2, config.hidden)
    loss = whole(rows)
    assert torch.equal(sent, loss)
    loss.mean().backward()
    sent.mean().backward()
    found: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, param in stage.named_parameters():
            if rows.drafts or not is_adapter(name):
                found[name] = found.get(name, 0) + param.grad
    for name, param in whole.named_parameters():
        if name not in found:
            assert is_adapter(name)
            continue
        torch.testing.assert_close(found[name], param.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.one_process
def test_no_probability_for_padding_of_the_vocabulary():
    config = PAPER
    assert config.padded_vocab == 128
    stage = build(config)
    rows = arrange(np.zeros((1, 16), dtype=np.int64), orders.left_to_right(16), 1)
    probabilities = stage.logits(stage.hidden(rows)).softmax(-1)
    assert float(probabilities[..., config.vocab_size :].abs().max()) == 0.0


@given(st.integers(2, 12), st.data())
def test_rows_of_a_batch(length, data):
    """Gathering by the order, and the visible prefixes, against their definitions."""
    order = np.array(data.draw(st.permutations(range(1, length + 1))))
    blocks = np.sort(np.array(data.draw(st.lists(st.integers(1, 4), min_size=length, max_size=length))))
    tokens = np.arange(100, 100 + length)[None]
    rows = arrange(tokens, Layout(order, blocks), 7)
    assert rows.context_tokens[0].tolist() == [7, *(99 + order[:-1])]
    assert rows.context_positions[0].tolist() == [0, *order[:-1]]
    assert rows.target_tokens[0].tolist() == (99 + order).tolist()
    assert rows.target_positions[0].tolist() == order.tolist()
    context, target = [0, *blocks[:-1]], list(blocks)
    if rows.visible is None:
        assert len(set(blocks)) == length
        return
    for n in range(length):
        assert int(rows.visible.context_of_context[0, n]) == sum(b <= context[n] for b in context)
        assert int(rows.visible.context_of_target[0, n]) == sum(b < target[n] for b in context)
        assert int(rows.visible.target_of_target[0, n]) == sum(b <= target[n] for b in target)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from([128, 4096]))
def test_the_cut_is_the_cheapest(layers, two_stream, runs, vocab):
    """Against all ways to cut."""
    runs, two_stream = min(runs, layers), min(two_stream, layers)
    c = ModelConfig(
        layers=layers, hidden=64, heads=4, length=64, two_stream_layers=two_stream, vocab_size=vocab, bos_id=0
    )
    cost = [layer_macs(c, index) for index in range(layers)]
    cost[0] += embedding_macs(c)
    cost[-1] += head_macs(c)

    def worst(starts):
        return max(sum(cost[a:b]) for a, b in itertools.pairwise([0, *starts, layers]))

    got = balanced_cuts(c, runs)
    assert len(got) == runs - 1
    assert worst(got) == pytest.approx(min(worst(s) for s in itertools.combinations(range(1, layers), runs - 1)))


def test_flops_match_the_definition():
    """Against a count by hand for a small shape: two-stream layer, sealing layer, causal layers, seed, head."""
    c = ModelConfig(layers=4, hidden=64, heads=4, length=256, vocab_size=128, bos_id=0)
    d, n = 64, 256
    projections_and_mlp = d * d + d * d + 8 * d * d  # query, output, MLP of one row
    row = projections_and_mlp + n * d  # plus scores and sums over n / 2 keys
    seeds = 3 * (128 + 2 * d) * d  # three kernels, by chunks of 2 d rows
    macs = 2 * row + 3 * row + 4 * 2 * d * d + seeds + 128 * d
    assert training_flops_per_token(c) == 6 * macs


@pytest.mark.one_process
def test_layers_are_built_from_specs():
    """Any linear with Megatron-Core's interface can take the place of its own: that is how TransformerEngine does."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    class Doubled(ColumnParallelLinear):
        def forward(self, *args, **kwargs):
            out, bias = super().forward(*args, **kwargs)
            return 2 * out, bias

    own = build(PAPER)
    parallel = groups.transformer_config(PAPER, ParallelConfig(), torch.float32)
    other = Stage(PAPER, parallel, kinds=Linears(ModuleSpec(Doubled), ModuleSpec(RowParallelLinear)))
    initialise([other], 3)
    assert sum(isinstance(module, Doubled) for module in other.modules()) == 3 * PAPER.layers
    for module in other.modules():
        if isinstance(module, Doubled):
            module.weight.data /= 2
    rows = arrange(np.arange(16)[None], orders.left_to_right(16), PAPER.bos_id)
    torch.testing.assert_close(other(rows), own(rows))


def test_transformer_engine_is_used_where_it_can_run(monkeypatch):
    from megatron.core.extensions import transformer_engine

    assert linears().column.module.__module__.startswith("megatron.core.tensor_parallel")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert linears().column.module.__module__.startswith("megatron.core.tensor_parallel")
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    assert linears().column.module is transformer_engine.TEColumnParallelLinear
    assert linears().row.module is transformer_engine.TERowParallelLinear


@pytest.mark.one_process
def test_both_cross_entropies_agree():
    """The fused one of a whole vocabulary, and Megatron's over a cut one, here in one part."""
    stage, tokens = build(PAPER), np.random.default_rng(3).integers(0, 50, (2, 16))
    h = stage.hidden(arrange(tokens, orders.left_to_right(16), 1)).detach()
    targets = torch.from_numpy(tokens)
    found = []
    for ranks in (1, 2):
        stage.config.tensor_model_parallel_size = ranks  # Megatron's own groups still have one process
        rows = h.clone().requires_grad_()
        nll = stage.nll(rows, targets)
        found.append([nll, *torch.autograd.grad(nll.mean(), [rows, stage.embedding.weight])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.one_process
@pytest.mark.parametrize("two_stream", [1, 2, 3])
@pytest.mark.parametrize("widths", [2.0, [1.0, 3.0]])
def test_left_to_right_it_is_the_transformer_with_the_same_weights(two_stream, widths):
    """With the neighbour in the seed and gates of zero, losses and gradients are those of ``objective=ar``."""
    seed = PrefixConfig(dim=16, width=widths, gate=0.0, neighbour=True, place="before")
    config = FEATURES.model_copy(update={"two_stream_layers": two_stream, "prefix": seed})
    model, transformer = build(config), build(left_to_right(config))
    missing, extra = transformer.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert [name for name in extra if not is_adapter(name)] == ["prefix.gate"]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 16))
    rows = arrange(tokens, orders.left_to_right(16), config.bos_id)
    losses = [stage(rows) for stage in (model, transformer)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.sum().backward()
    for name, param in transformer.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, param.grad, atol=1e-5, rtol=1e-4)
    assert model.prefix.gate.grad.abs().max() > 0, "the gates learn"


@pytest.mark.one_process
@pytest.mark.parametrize("change", [{"place": "target"}, {"neighbour": False}, {"gate": 0.1}])
def test_any_other_seed_is_another_model(change):
    seed = {"dim": 16, "gate": 0.0, "neighbour": True, "place": "before"} | change
    config = FEATURES.model_copy(update={"prefix": PrefixConfig(**seed)})
    model, transformer = build(config), build(left_to_right(config))
    transformer.load_state_dict(model.state_dict(), strict=False)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 16))
    rows = arrange(tokens, orders.left_to_right(16), config.bos_id)
    assert (model(rows) - transformer(rows)).abs().max() > 1e-3


@pytest.mark.one_process
@pytest.mark.parametrize("changes", [{}, {"two_stream_layers": 3, "target_mlp": False}, {"two_stream_layers": 1}])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_adapter_alone_has_the_losses_and_gradients_that_it_has_with_all(changes, recompute):
    config = FEATURES.model_copy(update=changes)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, (3, 16))
    rows = look_ahead(arrange(tokens, orders.left_to_right(16), 1), np.random.default_rng(5).integers(1, 4, (3, 16)))
    gradients, planes = [], []
    for freeze in (False, True):
        stage = build(config)
        stage.freeze, stage.recompute, stage.draft_law = freeze, recompute, True
        if freeze:
            for name, param in stage.named_parameters():
                param.requires_grad_(is_adapter(name))
        scores = stage(rows)
        scores[2].mean().backward()
        planes.append(scores.detach())
        gradients.append({name: param.grad for name, param in stage.named_parameters() if is_adapter(name)})
    torch.testing.assert_close(*planes, atol=1e-6, rtol=1e-5)
    assert {"prefix.draft_seed", "prefix.draft_gate"} < gradients[0].keys()
    for name, expected in gradients[0].items():
        assert expected.any(), name
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-7, rtol=1e-4, msg=name)
