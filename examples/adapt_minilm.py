"""Adapt a real encoder, save the adapter, load it onto a fresh model, and merge it."""

import torch

from corollary.adapt import LoRA, adapt, adapter_report, load_adapter, merge_and_unload, save_adapter
from corollary.data import minilm

tokenizer, model = minilm()
adapt(model, LoRA(rank=8), targets=("query", "value"))
print(adapter_report(model))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
texts = tokenizer(["matrices inside learning systems", "a cat on a mat"], padding=True, return_tensors="pt")
model(**texts).last_hidden_state.square().mean().backward()
optimizer.step()
save_adapter(model, "adapter.safetensors")
merged = merge_and_unload(load_adapter(minilm()[1], "adapter.safetensors"))
print((merged(**texts).last_hidden_state - model(**texts).last_hidden_state).abs().max().item())
