"""Initial weights and freezing of an `STDiT2`, as Open-Sora 1.1 starts its training."""

from __future__ import annotations

from torch import nn


def initialize_weights(model: nn.Module) -> None:
    """Xavier-uniform Linears with zero bias; normal(0.02) time, modulation and caption MLPs; zero where a block starts
    as the identity: temporal and cross-attention output, and the final Linear."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patch_weight = model.x_embedder.proj.weight
    nn.init.xavier_uniform_(patch_weight.data.view(patch_weight.shape[0], -1))
    captions = model.y_embedder.y_proj
    for linear in (
        model.t_embedder.mlp[0],
        model.t_embedder.mlp[2],
        model.t_block[1],
        model.t_block_temp[1],
        captions.fc1,
        captions.fc2,
    ):
        nn.init.normal_(linear.weight, std=0.02)
    for block in model.blocks:
        for linear in (block.attn_temp.proj, block.cross_attn.proj):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)


def freeze(model: nn.Module, part: str | None) -> None:
    """Stops training of all but temporal attention ("not_temporal") or of cross-attention ("text")."""
    for name, parameter in model.named_parameters():
        if part == "not_temporal" and "attn_temp" not in name:
            parameter.requires_grad_(False)
        if part == "text" and "cross_attn" in name:
            parameter.requires_grad_(False)
