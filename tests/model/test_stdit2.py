"""STDiT2 computes what Open-Sora 1.1 computes, on batches and on packs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from opensora_fast import STDiT2, STDiT2Config
from opensora_fast.model.checkpoint_files import load_checkpoint_file
from opensora_fast.model.positions import position_embedding

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_config() -> STDiT2Config:
    with safe_open(GOLDEN / "stdit2_weights.safetensors", "pt") as file:
        return STDiT2Config(**json.loads(file.metadata()["meta"])["config"])


@pytest.fixture(scope="module")
def model() -> STDiT2:
    model = STDiT2(golden_config()).eval()
    model.load_state_dict(load_file(GOLDEN / "stdit2_weights.safetensors"), strict=True)
    return model


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("case", ["plain", "frame_mask"])
@pytest.mark.parametrize("checkpointed", [0, 1, 2])
def test_outputs_and_gradients_equal_the_golden_files(model, case, checkpointed):
    data = load_file(GOLDEN / f"stdit2_{case}.safetensors")
    inputs = {name[3:]: value for name, value in data.items() if name.startswith("in.")}
    inputs["x"].requires_grad_(True)
    model.zero_grad()
    model.set_checkpointing(checkpointed)
    output = model(**inputs)
    assert output.dtype == torch.float32
    assert relative(output, data["out"]) < 1e-5
    (output * data["out_weight"]).sum().backward()
    assert relative(inputs["x"].grad, data["grad_x"]) < 1e-4
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    golden = {name[5:]: value for name, value in data.items() if name.startswith("grad.")}
    assert len(golden) > 10
    for name, value in golden.items():
        assert relative(gradients[name], value) < 1e-4, name
    model.set_checkpointing(0)


# Two are alike; two are upright and lying, and so of one area, by which positions are scaled.
SHAPES = [(1, 4, 6), (4, 6, 8), (4, 6, 8), (3, 5, 7), (2, 9, 4), (2, 4, 9), (1, 1, 1)]


def random_model(seed: int = 0, **keys) -> STDiT2:
    """A small model in which every parameter is random, so that no branch is zero as it is at the start of training."""
    torch.manual_seed(seed)
    model = STDiT2(STDiT2Config.small(**keys)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def random_pack(shapes, masked: bool, seed: int = 0, text: int = 8):
    generator = torch.Generator().manual_seed(seed)
    videos = [torch.randn(4, *shape, generator=generator) for shape in shapes]
    count = len(shapes)
    lengths = torch.randint(1, text + 1, (count,), generator=generator)
    conditions = {
        "timestep": torch.randint(0, 1000, (count,), generator=generator).float(),
        "y": torch.randn(count, 1, text, 32, generator=generator),
        "mask": (torch.arange(text) < lengths[:, None]).long(),
        "num_frames": torch.tensor([float(shape[0]) for shape in shapes]),
        "height": torch.tensor([float(shape[1] * 8) for shape in shapes]),
        "width": torch.tensor([float(shape[2] * 8) for shape in shapes]),
        "ar": torch.tensor([shape[2] / shape[1] for shape in shapes]),
        "fps": torch.randint(8, 60, (count,), generator=generator).float(),
    }
    masks = [torch.rand(shape[0], generator=generator) < 0.6 for shape in shapes] if masked else None
    return videos, conditions, masks


@pytest.mark.parametrize("masked", [False, True])
def test_a_pack_of_different_shapes_equals_each_video_alone(masked):
    model = random_model()
    videos, conditions, masks = random_pack(SHAPES, masked)
    together = model.forward_packed(videos, x_masks=masks, **conditions)
    for index, video in enumerate(videos):
        alone = model(
            video[None],
            x_mask=masks[index][None] if masked else None,
            **{name: value[index : index + 1] for name, value in conditions.items()},
        )
        assert together[index].shape == (8, *video.shape[1:])
        assert relative(together[index], alone[0]) < 1e-5


def test_videos_without_a_mask_may_stand_beside_masked_ones():
    model = random_model()
    videos, conditions, masks = random_pack(SHAPES, masked=True)
    masks[1] = None
    together = model.forward_packed(videos, x_masks=masks, **conditions)
    alone = model(videos[1][None], **{name: value[1:2] for name, value in conditions.items()})
    assert relative(together[1], alone[0]) < 1e-5


def test_a_pack_may_be_given_as_one_tensor():
    model = random_model()
    videos, conditions, _ = random_pack([(2, 4, 4)] * 2, masked=False)
    as_list = model.forward_packed(videos, **conditions)
    as_tensor = model.forward_packed(torch.stack(videos), **conditions)
    assert torch.equal(torch.stack(as_tensor), torch.stack(as_list))


@pytest.mark.parametrize("checkpointed", [0, 1, 2])
def test_gradients_of_a_pack_equal_the_sum_over_its_videos(checkpointed):
    model = random_model()
    model.set_checkpointing(checkpointed)
    videos, conditions, masks = random_pack(SHAPES, masked=True)
    weights = [torch.randn(8, *video.shape[1:]) for video in videos]
    outputs = model.forward_packed(videos, x_masks=masks, **conditions)
    sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for index, video in enumerate(videos):
        row = {name: value[index : index + 1] for name, value in conditions.items()}
        output = model(video[None], x_mask=masks[index][None], **row)
        (output[0] * weights[index]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative(together[name], parameter.grad) < 1e-4, name


def test_a_frame_mask_of_all_noised_frames_changes_nothing():
    model = random_model()
    videos, conditions, _ = random_pack([(4, 6, 8)] * 2, masked=False)
    x = torch.stack(videos)
    plain = model(x, **conditions)
    assert relative(model(x, x_mask=torch.ones(2, 4, dtype=torch.bool), **conditions), plain) < 1e-6


def test_text_behind_the_mask_has_no_influence_and_holes_in_the_mask_are_skipped():
    model = random_model()
    videos, conditions, _ = random_pack([(2, 4, 4)] * 3, masked=False)
    x = torch.stack(videos)
    conditions["mask"] = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0], [1] * 8, [0, 0, 0, 0, 0, 0, 0, 1]])
    expected = model(x, **conditions)
    changed = torch.where(conditions["mask"][:, None, :, None] == 0, 1e3, conditions["y"])
    assert torch.equal(model(x, **(conditions | {"y": changed})), expected)
    compact = conditions["y"][:1, :, [0, 2, 3]]
    row = {name: value[:1] for name, value in conditions.items()} | {"y": compact, "mask": None}
    assert relative(model(x[:1], **row), expected[:1]) < 1e-5


def test_a_video_without_text_gets_no_cross_attention():
    model = random_model()
    videos, conditions, _ = random_pack([(2, 4, 4)] * 2, masked=False)
    conditions["mask"] = torch.tensor([[0] * 8, [1] * 8])
    output = model(torch.stack(videos), **conditions)
    assert output.isfinite().all()
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_positions_of_a_batch_follow_its_first_video_and_those_of_a_pack_each_video():
    model = random_model()
    videos, conditions, _ = random_pack([(2, 4, 6)] * 2, masked=False)
    conditions["height"] = torch.tensor([32.0, 320.0])
    batch = model(torch.stack(videos), **conditions)
    pack = model.forward_packed(videos, **conditions)
    assert relative(pack[0], batch[0]) < 1e-6
    assert relative(pack[1], batch[1]) > 1e-3


def test_conditioning_of_half_the_rows_is_repeated_for_guidance():
    model = random_model()
    videos, conditions, _ = random_pack([(2, 4, 4)] * 4, masked=False)
    half = {
        n: v[:2] if n in ("mask", "num_frames", "height", "width", "ar", "fps") else v for n, v in conditions.items()
    }
    full = {n: v.repeat(2, *[1] * (v.ndim - 1)) if v.shape[0] == 2 else v for n, v in half.items()}
    x = torch.stack(videos)
    assert torch.equal(model(x, **half), model(x, **full))


def test_training_replaces_captions_by_the_stored_one_with_the_configured_probability():
    model = random_model(class_dropout_prob=0.3)
    y = torch.zeros(2000, 8, 32)
    torch.manual_seed(1)
    dropped = model.y_embedder.draw_dropped(2000)
    assert 0.25 < dropped.float().mean() < 0.35
    torch.manual_seed(1)
    with torch.device("meta"):  # drawn on the host whatever the default device is
        assert torch.equal(model.y_embedder.draw_dropped(2000), dropped)
    assert torch.equal((model.y_embedder.drop(y, dropped) != 0).any(dim=(1, 2)), dropped)
    videos, conditions, _ = random_pack([(1, 2, 2)] * 2, masked=False)
    model.train()
    with pytest.raises(ValueError, match="model_max_length"):
        model(torch.stack(videos), **(conditions | {"y": conditions["y"][:, :, :5], "mask": None}))


def test_the_released_model_has_767_million_parameters():
    with torch.device("meta"):
        model = STDiT2(STDiT2Config.xl_2())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e6, 1) == 767.5


def test_a_new_model_predicts_zero_and_its_blocks_add_neither_time_nor_text():
    torch.manual_seed(0)
    model = STDiT2(STDiT2Config.small()).eval()
    videos, conditions, _ = random_pack([(3, 4, 4)], masked=False)
    assert model(torch.stack(videos), **conditions).abs().max() == 0
    assert all(block.attn_temp.proj.weight.abs().max() == 0 for block in model.blocks)
    assert all(block.cross_attn.proj.weight.abs().max() == 0 for block in model.blocks)


def test_a_saved_model_loads_again_bit_for_bit(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "model")
    again = STDiT2.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_released_configuration_files_load_and_unknown_keys_are_named(tmp_path):
    released = {
        "_attn_implementation_autoset": True,
        "architectures": ["STDiT2"],
        "auto_map": {"AutoModel": "stdit2.STDiT2"},
        "model_type": "STDiT2",
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "input_size": [None, None, None],
        "enable_flash_attn": False,
        "hidden_size": 144,
        "num_heads": 2,
    }
    assert STDiT2Config(**released).hidden_size == 144
    with pytest.raises(ValueError, match="'hiden_size'.*'hidden_size'"):
        STDiT2Config(hiden_size=144)
    with pytest.raises(ValueError, match="^STDiT2Config: hidden_size 100 must be divisible by 3") as mistake:
        STDiT2Config(hidden_size=100)
    assert "\n" not in str(mistake.value)
    with pytest.raises(ValueError, match="^STDiT2Config: drop_path: drop_path 0.1 is not supported"):
        STDiT2Config(drop_path=0.1)
    with pytest.warns(UserWarning, match="enable_flashattn"):
        STDiT2Config(enable_flashattn=True)
    # as Open-Sora 1.2 saves a model of 1.1
    assert STDiT2Config(**released, qk_norm=True, qk_norm_legacy=True).qk_norm
    with pytest.raises(ValueError, match="^STDiT2Config: qk_norm_legacy=False is another model.*need True"):
        STDiT2Config(qk_norm=True, qk_norm_legacy=False)
    random_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(released | {"qk_nrom": True}))
    with pytest.raises(ValueError, match="config.json.*'qk_nrom'.*'qk_norm'"):
        STDiT2.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"depth": 3}))
    with pytest.raises(ValueError, match=r"missing blocks\.2"):
        STDiT2.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):
        STDiT2.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        STDiT2.from_pretrained(tmp_path / "absent" / "model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", "config.json: must hold one JSON object, not list"),
        ("config.json", '{"depth": 2\n"qk_norm": true}', "config.json:2: not valid JSON"),
        ("config.json", "[" * 100_000, "config.json: not valid JSON"),
        ("config.json", '{"mlp_ratio": Infinity}', "mlp_ratio inf"),
        ("config.json", '{"mlp_ratio": 1e308}', "mlp_ratio 1e\\+308"),
        ("config.json", '{"mlp_ratio": -1}', "mlp_ratio -1"),
        ("model.safetensors.index.json", "[]", "index.json: not an index of shards"),
        ("model.safetensors.index.json", "{}", "index.json: not an index of shards"),
        ("model.safetensors.index.json", '{"weight_map": {"rope.freqs": 3}}', "index.json: not an index of shards"),
        ("model.safetensors.index.json", '{"weight_map": {"rope.freqs": "../x"}}', "missing"),
    ],
)
def test_broken_files_of_a_model_folder_are_named(tmp_path, name, content, message):
    random_model().save_pretrained(tmp_path)
    if name.endswith(".index.json"):
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        STDiT2.from_pretrained(tmp_path)


def test_a_model_that_was_saved_into_a_folder_of_shards_is_the_one_that_loads(tmp_path):
    before, after = random_model(), random_model()
    with torch.no_grad():
        after.t_block[1].bias.add_(1.0)
    before.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(before.state_dict(), "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(STDiT2.from_pretrained(tmp_path).t_block[1].bias, before.t_block[1].bias)
    after.save_pretrained(tmp_path)
    assert torch.equal(STDiT2.from_pretrained(tmp_path).t_block[1].bias, after.t_block[1].bias)
    assert torch.equal(load_checkpoint_file(tmp_path)["t_block.1.bias"], after.t_block[1].bias)


@pytest.mark.parametrize("blocks", [1.5, "2", None, -1, 3])
def test_checkpointing_takes_a_number_of_blocks_that_the_model_has(blocks):
    model = random_model()
    with pytest.raises(ValueError, match=f"set_checkpointing: {blocks!r}"):
        model.set_checkpointing(blocks)
    for given, kept in ((True, len(model.blocks)), (False, 0), (1, 1)):
        model.set_checkpointing(given)
        assert model.checkpointed_blocks == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_what_upstream_rounds(dtype):
    """Outputs of upstream in half precision are met more closely than their distance from float32's."""
    name, half = str(dtype).removeprefix("torch."), load_file(GOLDEN / "stdit2_half.safetensors")
    model = STDiT2(golden_config()).eval()
    model.load_state_dict(load_file(GOLDEN / "stdit2_weights.safetensors"))
    model.to(dtype)
    for case in ("plain", "frame_mask"):
        data, expected = load_file(GOLDEN / f"stdit2_{case}.safetensors"), half[f"{case}.{name}"]
        with torch.no_grad():
            output = model(**{key[3:]: value for key, value in data.items() if key.startswith("in.")})
        assert relative(output, expected) < relative(expected, data["out"])
    positions = position_embedding(9, 16, 0.4, 144, torch.device("cpu"), rounded_to=dtype).to(dtype)
    assert torch.equal(positions.float(), half[f"positions.{name}"])


def test_upstreams_rounding_is_an_option_that_only_matters_below_float32():
    videos, conditions, _ = random_pack([(4, 4, 4)], masked=False)
    conditions["timestep"] = torch.tensor([333.0])
    rounded, exact = random_model(), random_model(upstream_rounding=False)
    x = torch.stack(videos)
    assert torch.equal(rounded(x, **conditions), exact(x, **conditions))
    rounded, exact = rounded.bfloat16(), exact.bfloat16()
    assert rounded.rope.freqs.dtype == torch.bfloat16 and exact.rope.freqs.dtype == torch.float32
    assert not torch.equal(rounded(x, **conditions), exact(x, **conditions))


def test_freezing_leaves_only_the_named_part_trainable():
    temporal_only = STDiT2(STDiT2Config.small(freeze="not_temporal"))
    trainable = [name for name, p in temporal_only.named_parameters() if p.requires_grad]
    assert trainable and all("attn_temp" in name for name in trainable)
    without_text = STDiT2(STDiT2Config.small(freeze="text"))
    frozen = {name for name, p in without_text.named_parameters() if not p.requires_grad} - {"rope.freqs"}
    assert frozen == {name for name, _ in without_text.named_parameters() if "cross_attn" in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": None}, "height: missing"),
        ({"timestep": torch.zeros(3)}, "timestep: 3 rows for 2 videos"),
        ({"y": torch.zeros(2, 8, 32)}, "y: shape"),
        ({"y": None}, "y: expected a tensor with several elements, got NoneType"),
        ({"mask": torch.ones(2, 5)}, "mask: shape"),
        ({"mask": [1] * 8}, "mask: expected a tensor with several elements, got list"),
        ({"mask": torch.tensor(1)}, "mask: expected a tensor with several elements, got a single number"),
        ({"x_mask": [True, True]}, "x_mask: expected a tensor with several elements, got list"),
        ({"x_mask": torch.ones(2, 9, dtype=torch.bool)}, "x_mask: shape"),
        ({"x": [torch.zeros(4, 2, 4, 4)] * 2}, "x: expected a tensor with several elements, got list"),
        ({"x": torch.zeros(2, 3, 2, 4, 4)}, "x: 3 channels"),
        ({"x": torch.zeros(2, 4, 2, 4, 4, dtype=torch.uint8)}, "x: torch.uint8, expected floating-point"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    model = random_model()
    videos, conditions, _ = random_pack([(2, 4, 4)] * 2, masked=False)
    with pytest.raises(ValueError, match=message):
        model(**({"x": torch.stack(videos)} | conditions | change))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 4, 2, 4, 4), "shape .*, expected .channels, T, H, W."),
        (torch.zeros(3, 2, 4, 4), "3 channels, but the model takes 4"),
        (torch.zeros(4, 2, 4, 4, dtype=torch.uint8), "torch.uint8, expected floating-point"),
        (torch.zeros(4, 2, 4, 4, device="meta"), "is on meta, but the model is on cpu"),
    ],
)
def test_a_video_of_a_pack_that_does_not_fit_is_named(video, message):
    model = random_model()
    videos, conditions, _ = random_pack([(2, 4, 4)] * 2, masked=False)
    with pytest.raises(ValueError, match=rf"videos\[1\]:? {message}"):
        model.forward_packed([videos[0], video], **conditions)


def test_a_mask_of_a_pack_that_does_not_fit_is_named():
    model = random_model()
    videos, conditions, _ = random_pack([(2, 4, 4)] * 2, masked=False)
    for mask, message in (
        ([True, False], r"x_masks\[1\] must be a tensor or None, got list"),
        (torch.tensor([True]), r"x_masks\[1\]: shape \(1,\), but the video has 2 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_packed(videos, x_masks=[None, mask], **conditions)


def test_the_model_takes_a_decision_on_captions_that_is_drawn_already():
    model = random_model(class_dropout_prob=0.5).train()
    videos, conditions, _ = random_pack([(1, 2, 2)] * 3, masked=False)
    x, dropped = torch.stack(videos), torch.tensor([True, False, True])
    state = torch.get_rng_state()
    output = model(x, **conditions, dropped=dropped)
    assert torch.equal(torch.get_rng_state(), state)
    stored = model.y_embedder.y_embedding.expand_as(conditions["y"])
    captions = torch.where(dropped[:, None, None, None], stored, conditions["y"])
    assert torch.equal(output, model.eval()(x, **(conditions | {"y": captions})))
    assert torch.equal(output, model(x, **conditions, dropped=dropped))
    with pytest.raises(ValueError, match=r"dropped: torch.bool of shape \(2,\) for 3 captions"):
        model(x, **conditions, dropped=dropped[:2])
    with pytest.raises(ValueError, match="dropped: torch.int64 .*; give each a bool"):
        model(x, **conditions, dropped=dropped.long())
