"""G-ACT against a plain computation of its parts, and what a hook must keep."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from corollary.adapt import GACT
from corollary.models import GPT


def gpt(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return GPT(256, dim=16, depth=3, heads=2, context=12).to(dtype).eval()


def pairs(seed=0, n=12, length=8):
    g = torch.Generator().manual_seed(seed)
    source = torch.randint(0, 100, (n, length), generator=g)
    return source, source + 100


def streams(model, tokens):
    """The residual stream behind each block, computed without hooks."""
    x, found = model.embed(tokens), []
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return torch.stack(found, 2)  # (batch, tokens, layers, width)


def fitted(model=None, **options):
    return GACT(model or gpt(), ["blocks.*"], **{"clusters": 3, **options}).fit(*pairs())


@pytest.mark.parametrize("pool", ["last", "mean"])
@torch.no_grad()
def test_vectors_are_the_clusters_mean_differences(pool):
    model = gpt()
    steerer = fitted(model, pool=pool)
    h = [streams(model, tokens) for tokens in pairs()]
    h = [x[:, -1] if pool == "last" else x.mean(1) for x in h]
    d = (h[1] - h[0]).numpy()
    # The partition that the vectors imply is a fixed point of k-means: nearest centres, and centres that are means.
    centres = steerer.centroids.reshape(3, -1).numpy()
    labels = np.array([np.argmin([((row.ravel() - c) ** 2).sum() for c in centres]) for row in d])
    assert set(labels) == {0, 1, 2}
    for c in range(3):
        mean = np.mean([row for row, label in zip(d, labels, strict=True) if label == c], axis=0)
        assert np.abs(steerer.vectors[:, c].numpy() - mean).max() < 1e-6


@torch.no_grad()
def test_steered_forward_equals_the_blocks_called_by_hand():
    model = gpt(dtype=torch.float64)
    steerer = fitted(model, lr=0.1)
    tokens = pairs(3)[0]
    state = steerer.state_dict()
    x = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        x = block(x)
        for i in range(len(tokens)):
            for t in range(tokens.shape[1]):
                z = (x[i, t].float() - state["mean"][layer]) / state["scale"][layer]
                scores = [float(z @ w + b) for w, b in zip(state["weight"][layer], state["bias"][layer], strict=True)]
                x[i, t] += 1.5 * state["vectors"][layer, int(np.argmax(scores))].double()
    expected = model.head(model.norm(x))
    with steerer.steer(1.5):
        ours = model(tokens)
    assert (ours - expected).abs().max() < 1e-6


def test_probes_learn_by_adam_on_the_cross_entropy():
    """Fitting and refining equal torch's Adam through autograd on one linear layer a probe."""
    model = gpt()
    # 11 pairs in 3 clusters: were a probability's error exactly zero, Adam would blow its rounding up to a whole step.
    steerer = GACT(model, ["blocks.*"], lr=0.05, epochs=7).fit(*pairs(n=11))
    for seed in (5, 6):
        steerer.refine(*pairs(seed, n=4))
    with torch.no_grad():
        h = [[streams(model, tokens)[:, -1] for tokens in pairs(seed, n=n)] for seed, n in ((0, 11), (5, 4), (6, 4))]
    mean, std = h[0][0].mean(0), h[0][0].std(0, correction=0)
    centres = steerer.centroids
    for layer in range(3):
        probe = nn.Linear(16, 3)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        adam = torch.optim.Adam(probe.parameters(), lr=0.05)
        for source, target in [h[0]] * 7 + h[1:]:
            labels = torch.cdist((target - source).flatten(1), centres).argmin(1)
            adam.zero_grad()
            F.cross_entropy(probe((source[:, layer] - mean[layer]) / std[layer]), labels).backward()
            adam.step()
        state = steerer.state_dict()
        assert (state["weight"][layer] - probe.weight).abs().max() < 1e-4
        assert (state["bias"][layer] - probe.bias).abs().max() < 1e-4


@torch.no_grad()
def test_score_is_the_share_of_clusters_that_the_probes_tell():
    model = gpt()
    steerer = fitted(model, epochs=5)
    source, target = pairs(9, n=20)
    h, other = streams(model, source)[:, -1], streams(model, target)[:, -1]
    state = steerer.state_dict()
    expected = np.zeros(3)
    for i in range(20):
        d = (other[i] - h[i]).ravel()
        label = min(range(3), key=lambda c: float((d - state["centroids"][c]).square().sum()))
        for layer in range(3):
            z = (h[i, layer] - state["mean"][layer]) / state["scale"][layer]
            expected[layer] += int((state["weight"][layer] @ z + state["bias"][layer]).argmax()) == label
    assert np.abs(steerer.score(source, target).numpy() - expected / 20).max() < 1e-6


@torch.no_grad()
def test_a_cache_gives_what_the_whole_prefix_gives():
    """A position's steering depends on that position alone: a decoder with a key-value cache generates the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    model = transformers.LlamaForCausalLM(config).eval()
    steerer = GACT(model, ["model.layers.*"], clusters=2).fit(*({"input_ids": t} for t in pairs()))
    prompt, free = pairs(4, n=3)[0], {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(prompt, **free)
    with steerer.steer(30.0):
        cached = model.generate(prompt, use_cache=True, **free)
        whole = model.generate(prompt, use_cache=False, **free)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain)
    assert torch.equal(model.generate(prompt, **free), plain)


@torch.no_grad()
def test_gpt2_and_an_encoder_of_torch_are_steered_too():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=200, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
    x = torch.randn(6, 8, 16)
    for model, layers, source, target, read in (
        (transformers.GPT2LMHeadModel(config).eval(), ["transformer.h.*"], *pairs(), lambda out: out.logits),
        (encoder.eval(), ["layers.*"], x, x + 1, lambda out: out),
    ):
        steerer = GACT(model, layers, clusters=2).fit(source, target)
        plain = read(model(source))
        with steerer.steer(3.0):
            assert not torch.equal(read(model(source)), plain)
        assert torch.equal(read(model(source)), plain)


def test_batches_give_what_one_batch_gives():
    source, target = pairs()
    whole = fitted()
    parts = GACT(gpt(), ["blocks.*"], clusters=3).fit([source[:5], source[5:]], [(target[:7],), {"tokens": target[7:]}])
    for key, tensor in whole.state_dict().items():
        assert (parts.state_dict()[key] - tensor).abs().max() < 1e-4


def test_comes_off_cleanly_in_any_order_and_on_errors():
    model = gpt()
    tokens = pairs()[0]
    plain, keys = model(tokens), copy.deepcopy(model.state_dict())
    one, two = fitted(model), fitted(model, clusters=2)
    a, b = one.steer(), two.steer(-1.0, layers=["blocks.1"])
    both = model(tokens)
    a.remove()
    only_b = model(tokens)
    assert len({tuple(x.flatten()[:50].tolist()) for x in (plain, both, only_b)}) == 3
    b.remove()
    b.remove()
    assert torch.equal(model(tokens), plain)
    with pytest.raises(RuntimeError), one.steer():
        raise RuntimeError
    with pytest.raises(ValueError, match="rows of 13"):
        one.fit(torch.zeros(2, 13, dtype=torch.int64), torch.zeros(2, 13, dtype=torch.int64))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, keys[k]) for k, v in model.state_dict().items())
    with one.steer(0.0):
        assert torch.equal(model(tokens), plain)


def test_resumes():
    model = gpt()
    steerer = fitted(model)
    steerer.refine(*pairs(1, n=4))
    other = GACT(model, ["blocks.*"], clusters=3)
    other.load_state_dict(load(save(steerer.state_dict())))
    for s in (steerer, other):
        s.refine(*pairs(2, n=4))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in steerer.state_dict().items())


def test_bad_input_is_named():
    model = gpt()
    source, target = pairs()
    for call, words in (
        (lambda: GACT(model, ["block.*"]), r"'layers' has 'block.\*', which matches no module; there are: embed"),
        (lambda: GACT(model, []), "'layers' is empty"),
        (lambda: GACT(model, ["blocks.*"], clusters=0), "'clusters' must be an int of at least 1, not 0"),
        (lambda: GACT(model, ["blocks.*"], pool="max"), "'pool' is 'max'; allowed: 'last', 'mean'"),
        (lambda: GACT(model, ["blocks.*"], lr=0.0), "'lr' must be finite and above 0, not 0.0"),
        (lambda: GACT(model, ["blocks.*"]).steer(), "call 'fit'"),
        (lambda: GACT(model, ["blocks.*"], clusters=20).fit(source, target), "12 pairs for 'clusters' = 20"),
        (lambda: GACT(model, ["blocks.*"]).fit(source, target[:3]), "'source' holds 12 prompts and 'target' 3"),
        (lambda: GACT(model, ["blocks.0", "blocks.1.mlp.up_proj"]).fit(source, target), r"widths \[16, 48\]"),
        (lambda: GACT(model, ["blocks.*"]).fit([], []), "no prompts"),
        (lambda: fitted(model).steer(float("nan")), "'strength' must be finite, not nan"),
        (lambda: fitted(model).steer(layers=["norm"]), "'layers' has 'norm', which was not fitted"),
        (lambda: fitted(model).load_state_dict({}), "'bias' is missing"),
        (
            lambda: GACT(model, ["blocks.*"], clusters=2).load_state_dict(fitted(model).state_dict()),
            r"'vectors' has shape \(3, 3, 16\); allowed: \(3, 2, 16\)",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match=r"'model' must be a torch.nn.Module, not str"):
        GACT("gpt", ["blocks.*"])
    with pytest.raises(TypeError, match="a batch of prompts must be a tensor, a tuple or a dict, not str"):
        GACT(model, ["blocks.*"]).fit("text", "text")
