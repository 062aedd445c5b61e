"""The adapters' base: targets, errors, files, peft, transformers. What every method promises is in the conformance checks."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from corollary.adapt import (
    LoRA,
    LoRASB,
    LoRAXS,
    Site,
    VeRA,
    adapt,
    adapter_report,
    adapter_state_dict,
    delete_adapter,
    from_peft,
    load_adapter,
    mean_gradients,
    merge_adapters,
    merge_and_unload,
    save_adapter,
    set_adapters,
    to_peft,
    unmerge_adapters,
)

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """One layer of each kind that peft's LoRA takes."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(20, 12)
        self.linear = nn.Linear(12, 10)
        self.flipped = Conv1D(6, 10)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, (3, 1), stride=(2, 1), padding=(1, 0))

    def forward(self, ids):
        h = torch.tanh(self.linear(self.embed(ids)))
        h = torch.tanh(self.flipped(h)).transpose(1, 2)
        h = torch.tanh(self.conv1(h))
        return self.conv2(h[..., None].expand(*h.shape, 3))


ALL = ("embed", "linear", "flipped", "conv1", "conv2")


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def ids():
    return torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(1))


def moved(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


# ---------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize(("alpha", "rslora"), [(None, False), (3, False), (3, True)])
def test_lora_equals_peft_given_its_factors(tmp_path, alpha, rslora):
    """peft writes a checkpoint of perturbed factors; we read it, and give its outputs and its merged weights."""
    config = peft.LoraConfig(r=4, lora_alpha=alpha or 4, target_modules=list(ALL), use_rslora=rslora)
    theirs = moved(peft.get_peft_model(net(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_peft(net(), tmp_path)
    assert ours(ids()).shape == theirs(ids()).shape
    assert (ours(ids()) - theirs(ids())).abs().max() < 1e-5
    merged = theirs.merge_and_unload()
    for key, tensor in merge_and_unload(ours).state_dict().items():
        assert (tensor - merged.state_dict()[key]).abs().max() < 1e-5, key


@pytest.mark.parametrize(
    "config", [LoRA(rank=3, alpha=5), LoRA(rank=3, alpha=5, use_rslora=True), VeRA(rank=5), LoRAXS(rank=4)]
)
def test_peft_reads_what_we_write(tmp_path, config):
    ours = moved(adapt(net(), config, ALL))
    theirs = peft.PeftModel.from_pretrained(net(), to_peft(ours, tmp_path)).eval()
    assert (ours(ids()) - theirs(ids())).abs().max() < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_peft_checkpoint_goes_through_us_unchanged(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["linear", "conv2"])
    theirs = moved(peft.get_peft_model(net(), config))
    theirs.save_pretrained(tmp_path / "theirs")
    to_peft(from_peft(net(), tmp_path / "theirs"), tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_vera_equals_peft():
    config = peft.VeraConfig(r=6, target_modules=["linear"], projection_prng_key=3, d_initial=0.2)
    theirs = peft.get_peft_model(net(), config).eval()
    ours = adapt(net(), VeRA(rank=6, seed=3, d_initial=0.2), "linear")
    adapter = ours.linear.adapters["default"]
    layer = theirs.base_model.model.linear
    with torch.no_grad():
        for own, other in (
            (adapter.vera_lambda_b, layer.vera_lambda_b.default),
            (adapter.vera_lambda_d, layer.vera_lambda_d.default),
        ):
            own.add_(torch.arange(len(own)) / 7)
            other.copy_(own)
    assert (ours(ids()) - theirs(ids())).abs().max() < 1e-6
    assert (adapter.vera_A - layer.vera_A["default"]).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "method is VERA"),
        ({"use_dora": True}, "uses 'use_dora'"),
        ({"bias": "all"}, "trains biases"),
        ({"r": 5}, "not of rank 5"),
        ({"r": None}, "'rank' must be an int"),
    ],
)
def test_what_lora_has_not_is_refused(tmp_path, change, message):
    to_peft(adapt(net(), LoRA(rank=3), "linear"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = net()
    with pytest.raises((ValueError, TypeError), match=message):
        from_peft(model, tmp_path)
    assert list(model.state_dict()) == list(net().state_dict())


def test_a_broken_peft_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        from_peft(net(), tmp_path)
    to_peft(adapt(net(), LoRA(rank=3), "linear"), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x80\x04not a checkpoint")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        from_peft(net(), tmp_path)


# ------------------------------------------------------------------------------------------------------- kinds of layer


def test_a_grouped_convolution_has_the_dense_change_of_its_factors():
    """The change of a grouped kernel, entry by entry from B A, in a plain convolution."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 9, 3, padding=1, groups=3).double()
    model = moved(adapt(nn.Sequential(layer), LoRA(rank=2), nn.Conv2d))
    adapter = layer.adapters["default"]
    a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
    kernel = layer.weight.detach().clone()
    for o in range(9):
        for c in range(2):
            for i in range(3):
                for j in range(3):
                    kernel[o, c, i, j] += sum(b[o, r] * a[r, (c * 3 + i) * 3 + j] for r in range(2))
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    assert (model(x) - F.conv2d(x, kernel, layer.bias, padding=1, groups=3)).abs().max() < 1e-12


def test_attention_is_refused_where_an_adapter_would_do_nothing():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(TypeError, match="never called as a layer"):
        adapt(attention, LoRA(rank=2), "out_proj")
    with pytest.raises(ValueError, match="no Linear layer"):
        adapt(attention, LoRA(rank=2))


def test_fast_paths_of_torch_do_not_skip_the_adapter():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = encoder(x)
        model = moved(adapt(encoder, LoRA(rank=2), ("linear1", "linear2")))
        assert not torch.allclose(model(x), before)


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("linear", {"linear"}),
        ("conv.", {"conv1", "conv2"}),
        (nn.Conv2d, {"conv2"}),
        ((nn.Embedding, "linear"), {"embed", "linear"}),
        (None, {"linear", "flipped"}),
    ],
)
def test_targets(targets, found):
    model = adapt(net(), LoRA(rank=2), targets)
    assert {n for n, m in model.named_modules() if hasattr(m, "adapters")} == found


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("liner", ValueError, "no module matches 'liner'.*linear"),
        ((), ValueError, "'targets' is empty"),
        ("(", ValueError, "no valid pattern"),
        (3, TypeError, "not iterable|names, patterns"),
        ([3], TypeError, "names, patterns and module types"),
        (".*", TypeError, "cannot be adapted"),
    ],
)
def test_wrong_targets_name_what_there_is(targets, error, message):
    model = net()
    with pytest.raises(error, match=message):
        adapt(model, LoRA(rank=2), targets)
    assert list(model.state_dict()) == list(net().state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), "'rank' must be at least 1, not 0"),
        (lambda: LoRA(rank=2.0), "'rank' must be an int"),
        (lambda: LoRA(dropout=1.0), "'dropout' must be at least 0 and below 1"),
        (lambda: LoRA(alpha=math.nan), "'alpha' must be a finite number"),
        (lambda: adapt(net(), "lora"), "'config' must be"),
        (lambda: adapt("net", LoRA()), "'model' must be an nn.Module"),
        (lambda: adapt(net(), LoRA(), name="a.b"), "'name' must be an identifier"),
        (lambda: adapt(adapt(net(), LoRA()), LoRA()), "has an adapter 'default' already"),
        (lambda: adapt(net(), LoRA(), calibration={}), "takes no 'calibration'"),
        (lambda: adapt(net(), LoRASB()), "give 'calibration'"),
        (lambda: adapt(net(), LoRASB(rank=2), "linear", calibration={}), "no gradient for 'linear'"),
        (lambda: adapt(net(), LoRASB(rank=2), "linear", calibration={"linear": torch.zeros(10, 12)}), "zero or not finite"),
        (lambda: adapt(net(), LoRAXS(rank=11), "linear"), "'linear': 'rank' is 11, but the layer's matrix is 10 x 12"),
        (lambda: adapt(net(), LoRA(), modules_to_save=["hed"]), "no module or parameter matches 'hed'"),
        (lambda: set_adapters(adapt(net(), LoRA()), "b"), "no adapter 'b'; there are: default"),
        (lambda: merge_adapters(net()), "has no adapters"),
        (lambda: Site.of(nn.ReLU()), "a ReLU cannot be adapted"),
        (lambda: mean_gradients(net(), lambda b: None, []), "'batches' is empty"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# ------------------------------------------------------------------------------------------------------- merging, files


def test_tied_weights_are_not_merged_behind_the_users_back():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10, bias=False))
    model[1].weight = model[0].weight
    moved(adapt(model, LoRA(rank=2), nn.Linear))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"tied to '0\.weight'"):
        merge_adapters(model)
    assert torch.equal(model[0].weight, before)


def test_merging_refuses_what_is_not_finite_and_what_is_merged():
    model = moved(adapt(net(), LoRA(rank=2), ("linear", "flipped")))
    merge_adapters(model)
    with pytest.raises(ValueError, match="merged already"):
        merge_adapters(model, "default")
    with pytest.raises(ValueError, match="unmerge it first"):
        adapt(model, LoRA(rank=1), "linear", name="other")
    unmerge_adapters(model)
    before = model.linear.weight.clone()
    with torch.no_grad():
        model.flipped.adapters["default"].lora_B[0, 0] = math.inf
    with pytest.raises(ValueError, match="'flipped' would give a weight that is not finite"):
        merge_adapters(model)
    assert torch.equal(model.linear.weight, before), "a refused merge changed a weight"


def test_half_precision_merges_with_one_rounding():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).bfloat16()
    model = moved(adapt(layer, LoRA(rank=2)))
    adapter, weight = layer.adapters["default"], layer.weight.detach().clone()
    exact = weight.double() + adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    merge_adapters(model)
    spacing = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)
    # delta() itself is in bfloat16, so up to its own rounding more than one spacing.
    assert ((layer.weight.double() - exact).abs() <= 2 * spacing + exact.abs().max() * 2**-8).all()


def test_modules_to_save_train_and_travel(tmp_path):
    model = adapt(net(), LoRA(rank=2), "linear", modules_to_save=("conv2",))
    assert model.conv2.weight.requires_grad
    assert not model.conv1.weight.requires_grad
    moved(model)
    other = load_adapter(net(), save_adapter(model, tmp_path / "a.safetensors"))
    assert torch.equal(other(ids()), model(ids()))
    assert other.conv2.weight.requires_grad
    delete_adapter(other, "default")
    assert torch.equal(other.conv2.weight, model.conv2.weight)


@pytest.mark.parametrize("kind", ["missing", "pickle", "foreign", "method", "layer", "shape", "metadata"])
def test_broken_files_are_refused_and_the_model_is_as_before(tmp_path, kind):
    path = save_adapter(adapt(net(), LoRA(rank=2), "linear"), tmp_path / "a.safetensors")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata, state = file.metadata(), {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    if kind == "missing":
        path = tmp_path / "b.safetensors"
    elif kind == "pickle":
        torch.save(state, path)
    elif kind == "foreign":
        save_file(state, path)
    elif kind == "method":
        save_file(state, path, metadata | {"method": "LoRRA"})
    elif kind == "layer":
        save_file(state, path, metadata | {"sites": '["linaer"]'})
    elif kind == "shape":
        save_file(state | {"linear.lora_A": torch.zeros(2, 13)}, path, metadata)
    else:
        save_file(state, path, metadata | {"config": "{"})
    model = net()
    with pytest.raises(ValueError, match=r"path|method|layer|state"):
        load_adapter(model, path)
    assert list(model.state_dict()) == list(net().state_dict())
    assert not any(m._forward_hooks for m in model.modules())


def test_saving_is_whole_or_not_at_all(tmp_path):
    model = adapt(net(), LoRA(rank=2), "linear")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_adapter(model, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="there is no folder"):
        save_adapter(model, tmp_path / "no" / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- report


def test_report_counts_what_the_formulas_say():
    model = adapt(net(), LoRA(rank=3), ("linear", "conv2"), modules_to_save=("embed",))
    report = adapter_report(model)
    assert {row.layer: row.trainable for row in report.layers} == {"linear": 3 * (12 + 10), "conv2": 3 * (8 * 3 + 4)}
    assert report.trainable == 3 * 22 + 3 * 28 + 20 * 12
    assert report.total == sum(p.numel() for p in net().parameters())
    assert report.saved_bytes == 4 * report.trainable
    assert report.step_seconds is None
    assert "22 x" not in str(report)
    assert json.loads(json.dumps(report.to_dict()))["share"] == report.share


def test_report_measures_a_step():
    model = adapt(nn.Linear(64, 64), LoRA(rank=2))
    x = torch.randn(128, 64)
    calls = []

    def step():
        calls.append(1)
        model(x).square().mean().backward()

    report = adapter_report(model, step, rounds=3)
    assert len(calls) == 5
    assert report.step_seconds > 0
    assert report.step_bytes >= 128 * 64 * 4


def test_the_forward_never_forms_the_dense_change():
    """Memory of a step with a wide layer stays far below one matrix of its size."""
    from corollary.memory import peak_bytes

    layer = nn.Linear(2048, 2048, bias=False)
    model = adapt(layer, LoRA(rank=2))
    x = torch.randn(4, 2048)
    peak = peak_bytes(lambda: model(x).sum().backward())
    assert peak < 2048 * 2048 * 4 / 20


# --------------------------------------------------------------------------------------------------------- transformers


def test_trainer_trains_and_the_adapter_travels(tmp_path):
    """A BERT inside transformers' Trainer: only the adapter moves, and it comes back from its own file."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    base = copy.deepcopy(model)
    adapt(model, LoRA(rank=2), ("query", "value"), modules_to_save=("classifier",))
    data = [{"input_ids": [i % 50, (7 * i) % 50, 3], "labels": i % 3} for i in range(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=3,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    model.eval()
    before, after = base.state_dict(), model.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert all(bool(t.any()) for k, t in adapter_state_dict(model).items() if k.endswith("lora_B"))
    x = {"input_ids": torch.tensor([[1, 2, 3]])}
    other = load_adapter(base.eval(), save_adapter(model, tmp_path / "a.safetensors"))
    assert torch.equal(other(**x).logits, model(**x).logits)
    model.save_pretrained(tmp_path / "whole")
    merged = merge_and_unload(model)
    assert set(merged.state_dict()) == set(before)
    assert (merged(**x).logits - other(**x).logits).abs().max() < 1e-5


def test_lora_sb_starts_from_the_first_step():
    """Against numpy: the change at the start is the truncated decomposition of -lr sign(G), G averaged over batches."""
    torch.manual_seed(0)
    model = nn.Linear(9, 7).double()
    batches = [(torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)) for _ in range(3)]
    gradients = mean_gradients(model, lambda b: F.mse_loss(model(b[0]), b[1]), batches)
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    by_hand = sum(2 * ((x.numpy() @ weight.T + bias) - y.numpy()).T @ x.numpy() / y.numel() for x, y in batches) / 3
    assert np.abs(gradients[""].numpy() - by_hand).max() < 1e-14
    assert model.weight.grad is None
    adapt(model, LoRASB(rank=3, lr=0.02), calibration=gradients)
    u, s, vt = np.linalg.svd(-0.02 * np.sign(by_hand))
    assert np.abs(model.adapters["default"].delta().detach().numpy() - (u[:, :3] * s[:3]) @ vt[:3]).max() < 1e-12
