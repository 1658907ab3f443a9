"""Starting from PixArt-α and Open-Sora weights, in the files their authors wrote."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_fast import STDiT2, STDiT2Config
from opensora_fast.model.pixart import convert_upstream_state_dict, initialize_from

GOLDEN = Path(__file__).parents[1] / "golden" / "stdit2_weights.safetensors"
DEPTH, CHANNELS, CAPTION_CHANNELS = 2, 144, 32


def make_model(**keys) -> STDiT2:
    torch.manual_seed(0)
    return STDiT2(STDiT2Config.small(**({"depth": DEPTH, "caption_channels": CAPTION_CHANNELS} | keys)))


def pixart_weights(captions: int = 6, multi_scale: bool = True, depth: int = DEPTH) -> dict[str, Tensor]:
    """Weights with the names and shapes of PixArt-α, as PixArt-XL-2-1024-MS.pth holds them, made of random numbers."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 16, CHANNELS),
        "x_embedder.proj.weight": (CHANNELS, 4, 2, 2),
        "x_embedder.proj.bias": (CHANNELS,),
        "y_embedder.y_embedding": (captions, CAPTION_CHANNELS),
        "final_layer.scale_shift_table": (2, CHANNELS),
    }
    linears = {
        "t_embedder.mlp.0": (CHANNELS, 256),
        "t_embedder.mlp.2": (CHANNELS, CHANNELS),
        "t_block.1": (6 * CHANNELS, CHANNELS),
        "y_embedder.y_proj.fc1": (CHANNELS, CAPTION_CHANNELS),
        "y_embedder.y_proj.fc2": (CHANNELS, CHANNELS),
        "final_layer.linear": (32, CHANNELS),
    }
    if multi_scale:
        for name in ("csize_embedder", "ar_embedder"):
            linears |= {f"{name}.mlp.0": (CHANNELS // 3, 256), f"{name}.mlp.2": (CHANNELS // 3, CHANNELS // 3)}
    for block in range(depth):
        shapes[f"blocks.{block}.scale_shift_table"] = (6, CHANNELS)
        linears |= {
            f"blocks.{block}.attn.qkv": (3 * CHANNELS, CHANNELS),
            f"blocks.{block}.attn.proj": (CHANNELS, CHANNELS),
            f"blocks.{block}.cross_attn.q_linear": (CHANNELS, CHANNELS),
            f"blocks.{block}.cross_attn.kv_linear": (2 * CHANNELS, CHANNELS),
            f"blocks.{block}.cross_attn.proj": (CHANNELS, CHANNELS),
            f"blocks.{block}.mlp.fc1": (4 * CHANNELS, CHANNELS),
            f"blocks.{block}.mlp.fc2": (CHANNELS, 4 * CHANNELS),
        }
    for name, (outputs, inputs) in linears.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def test_pixart_file_is_loaded_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = pixart_weights()
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "PixArt-XL-2-1024-MS.pth")
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = initialize_from(model, tmp_path / "PixArt-XL-2-1024-MS.pth")
    after = model.state_dict()

    for name, tensor in weights.items():
        if name not in ("pos_embed", "x_embedder.proj.weight", "y_embedder.y_embedding"):
            assert torch.equal(after[name], tensor), name
    assert torch.equal(after["x_embedder.proj.weight"][:, :, 0], weights["x_embedder.proj.weight"])
    captions = weights["y_embedder.y_embedding"]
    assert torch.equal(after["y_embedder.y_embedding"], torch.cat([captions, captions[-1:], captions[-1:]]))

    untouched = set(after) - set(weights)
    assert untouched == set(result.added) and all(torch.equal(after[name], before[name]) for name in untouched)
    assert result.missing == result.unexpected == result.mismatched == ()
    assert result.matched == 1.0 and len(result.loaded) == len(weights) - 1

    said = capsys.readouterr().out
    assert said.strip() == str(result)
    for part in (
        f"{len(weights) - 1} tensors loaded, 100.0 %",
        "pos_embed left out",
        "from 6 to 8 rows",
        "time axis",
        "blocks.*.attn_temp.qkv (4)",
        "rope.freqs",
    ):
        assert part in said, part
    assert "MISSING" not in said and "SHAPE" not in said


def test_a_fresh_start_makes_every_frame_by_itself(tmp_path: Path):
    """Why the start works: the temporal attention that PixArt lacks begins as the identity."""
    torch.save({"state_dict": pixart_weights()}, tmp_path / "pixart.pth")
    model = make_model().eval()
    initialize_from(model, tmp_path / "pixart.pth", report=None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3, 8, 8, generator=generator)
    text = torch.randn(1, 1, 8, CAPTION_CHANNELS, generator=generator)
    info = {name: torch.tensor([64.0]) for name in ("num_frames", "height", "width", "ar", "fps")}

    def run(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return model(latents, torch.tensor([300.0]), text, **info)

    whole = run(x)
    assert whole.std() > 0.01
    for frame in range(3):
        torch.testing.assert_close(whole[:, :, [frame]], run(x[:, :, [frame]]), rtol=1e-4, atol=1e-5)


def test_pixart_without_sizes_lacks_the_size_embedders(tmp_path: Path):
    torch.save(pixart_weights(multi_scale=False), tmp_path / "PixArt-XL-2-512x512.pth")
    result = initialize_from(make_model(), tmp_path / "PixArt-XL-2-512x512.pth", report=None)
    assert {name.split(".")[0] for name in result.missing} == {"csize_embedder", "ar_embedder"}
    assert 0.9 < result.matched < 1 and "MISSING" in str(result)


def test_a_longer_caption_is_cut():
    weights = pixart_weights(captions=11)
    converted, changes = convert_upstream_state_dict(weights, make_model())
    assert torch.equal(converted["y_embedder.y_embedding"], weights["y_embedder.y_embedding"][:8])
    assert any("cut from 11 to 8" in change for change in changes)
    assert weights["y_embedder.y_embedding"].shape[0] == 11 and "pos_embed" in weights  # the input is left as it was


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "ema", "module.", "nested", "beside a tensor"])
def test_open_sora_files(tmp_path: Path, wrap: str):
    golden = load_file(GOLDEN)
    state = golden | {"pos_embed": torch.zeros(1, 4, CHANNELS), "pos_embed_temporal": torch.zeros(1, 4, CHANNELS)}
    content = {
        "bare": state,
        "module.": {f"module.{key}": value for key, value in state.items()},
        "nested": {"model": {"state_dict": state}, "optimizer": {"lr": 0.1}},
        "beside a tensor": {"model": state, "ema": {}, "step": torch.tensor(3)},
    }.get(wrap, {wrap: state})
    torch.save(content, tmp_path / "open_sora.pt")
    model = make_model()
    result = initialize_from(model, tmp_path / "open_sora.pt", report=None)
    assert result.matched == 1.0 and not (result.added or result.missing or result.unexpected or result.mismatched)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, golden[name]), name


def test_saved_model_round_trip(tmp_path: Path):
    model = make_model()
    model.save_pretrained(tmp_path)
    other = make_model(model_max_length=12)
    result = initialize_from(other, tmp_path, report=None)
    assert result.matched == 1.0 and any("from 8 to 12 rows" in change for change in result.changes)


@pytest.mark.parametrize(
    "keys, part",
    [
        ({"hidden_size": 288, "num_heads": 4}, "check hidden_size and num_heads"),
        (
            {"depth": 12},
            "150 tensors are missing in the file, 0 have another shape, 0 are unknown to the model; these",
        ),
    ],
)
def test_a_start_that_matches_almost_nothing_is_an_error(tmp_path: Path, keys: dict, part: str):
    torch.save({"state_dict": pixart_weights()}, tmp_path / "pixart.pth")
    model = make_model(**keys)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="% of the model's parameters") as error:
        initialize_from(model, tmp_path / "pixart.pth")
    assert part in str(error.value) and "pixart.pth" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_diffusers_format_is_recognized(tmp_path: Path):
    state = {f"transformer_blocks.{i}.attn1.to_q.weight": torch.zeros(CHANNELS, CHANNELS) for i in range(4)}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"diffusers' format.*\.pth"):
        initialize_from(make_model(), tmp_path)


def test_half_of_the_weights_is_enough_and_reported(tmp_path: Path):
    """A start from a shallower model: its blocks are taken, the others are named."""
    torch.save({"state_dict": pixart_weights(depth=3)}, tmp_path / "pixart.pth")
    result = initialize_from(make_model(depth=4), tmp_path / "pixart.pth", report=None)
    assert 0.5 < result.matched < 1
    assert {key.split(".")[1] for key in result.missing} == {"3"} and "MISSING" in str(result)
    result = initialize_from(make_model(depth=2), tmp_path / "pixart.pth", report=None)
    assert result.matched == 1.0 and {key.split(".")[1] for key in result.unexpected} == {"2"}


def test_another_shape_is_reported_and_not_loaded(tmp_path: Path):
    weights = pixart_weights()
    weights["y_embedder.y_embedding"] = torch.zeros(6, 48)
    weights["y_embedder.y_proj.fc1.weight"] = torch.zeros(CHANNELS, 48)
    torch.save(weights, tmp_path / "pixart.pth")
    result = initialize_from(make_model(), tmp_path / "pixart.pth", report=None)
    assert ("y_embedder.y_proj.fc1.weight", (144, 48), (144, 32)) in result.mismatched
    assert "ANOTHER SHAPE in the file: y_embedder.y_embedding [8, 48] (model: [8, 32])" in str(result)
