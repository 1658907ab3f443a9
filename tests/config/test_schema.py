"""What configurations are accepted, what their errors say, and where values come from."""

import json
from pathlib import Path

import pytest

from opensora_fast.config import list_values, load_any_config, load_sample_config, load_train_config, to_json
from opensora_fast.config.schema import SampleConfig, TrainConfig
from opensora_fast.config.sections import ModelConfig
from opensora_fast.model.config import STDiT2Config

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
FACTS = Path(__file__).parents[1] / "golden" / "facts_opensora_v1_1.json"

# The keys of Open-Sora 1.1's own files, values made up: stage 1 of training and sampling with references.
UPSTREAM_TRAIN = """
dataset = dict(
    type="VariableVideoTextDataset", data_path=None, num_frames=None, frame_interval=3,
    image_size=(None, None), transform_name="resize_crop",
)
bucket_config = {"144p": {1: (0.5, 4), 16: (1.0, 2)}, "240p": {64: (0.0, None)}}
mask_ratios = {"mask_no": 0.9, "mask_image_head": 0.1}
num_workers = 8
num_bucket_build_workers = 16
dtype = "bf16"
grad_checkpoint = False
plugin = "zero2"
sp_size = 1
model = dict(
    type="STDiT2-XL/2", from_pretrained=None, input_sq_size=512, qk_norm=True,
    enable_flashattn=True, enable_layernorm_kernel=True,
)
vae = dict(type="VideoAutoencoderKL", from_pretrained="some/vae", micro_batch_size=4, local_files_only=True)
text_encoder = dict(
    type="t5", from_pretrained="some/t5", model_max_length=200, shardformer=True, local_files_only=True
)
scheduler = dict(type="iddpm", timestep_respacing="")
seed = 42
outputs = "outputs"
wandb = False
epochs = 1000
log_every = 10
ckpt_every = 500
load = None
batch_size = None
lr = 2e-5
grad_clip = 1.0
"""
UPSTREAM_SAMPLE = """
num_frames = 16
frame_interval = 3
fps = 24
image_size = (240, 426)
multi_resolution = "STDiT2"
prompt_path = None
prompt = ["one", 'two {"reference_path": "a.png", "mask_strategy": "0"}']
loop = 2
condition_frame_length = 4
mask_strategy = ["0,0,0,0,8,0.3", None]
reference_path = ["https://example.org/a.mp4", None]
model = dict(
    type="STDiT2-XL/2", from_pretrained="some/model", input_sq_size=512, qk_norm=True,
    enable_flash_attn=True, enable_layernorm_kernel=True,
)
vae = dict(type="VideoAutoencoderKL", from_pretrained="some/vae", cache_dir=None, micro_batch_size=4)
text_encoder = dict(type="t5", from_pretrained="some/t5", cache_dir=None, model_max_length=200)
scheduler = dict(type="iddpm", num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3)
dtype = "bf16"
batch_size = 1
seed = 42
save_dir = "./samples/samples/"
"""


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "stage.py"
    path.write_text(UPSTREAM_TRAIN)
    return path


def test_upstream_training_file_loads_and_idle_keys_are_named(train_file):
    loaded = load_train_config(train_file)
    assert loaded.config.dataset.frame_interval == 3
    assert loaded.config.bucket_config["144p"][16] == (1.0, 2)
    assert loaded.config.bucket_config["240p"][64] == (0.0, None)
    notes = "\n".join(loaded.notes)
    for key in (
        "model.enable_flashattn is read as model.enable_flash_attn",
        "model.enable_flash_attn=True has no effect",
        "model.enable_layernorm_kernel=True has no effect",
        "text_encoder.shardformer=True makes T5 compute in the configuration's dtype",
        "num_bucket_build_workers=16 has no effect",
        "plugin='zero2' has no effect",
        "outputs='outputs' has no effect",
    ):
        assert key in notes
    # Keys at their default are not worth a word.
    assert "wandb" not in notes and "batch_size" not in notes


def test_names_of_open_sora_1_2_in_files_of_1_1(tmp_path, train_file):
    """Its masks are called otherwise, and what the model of 1.1 does with queries and keys has a name."""
    path = tmp_path / "renamed.py"
    renamed = UPSTREAM_TRAIN.replace('"mask_no": 0.9, "mask_', '"identity": 0.9, "').replace(
        "qk_norm", "qk_norm_legacy"
    )
    path.write_text(renamed.replace("qk_norm_legacy=True", "qk_norm=True, qk_norm_legacy=True"))
    loaded = load_train_config(path)
    assert loaded.config == load_train_config(train_file).config
    assert "mask_ratios.image_head is read as mask_ratios.mask_image_head" in "\n".join(loaded.notes)
    assert loaded.get_origin("mask_ratios.mask_no") == "renamed.py:7"
    with pytest.raises(ValueError, match="model: qk_norm_legacy=False is another model.*need True"):
        load_train_config(path, ["model.qk_norm_legacy=False"])
    with pytest.raises(ValueError, match="mask_ratios.identity is another name of mask_ratios.mask_no, and both are"):
        load_train_config(path, ["mask_ratios.mask_no=0.9"])


def test_more_idle_keys(train_file):
    notes = "\n".join(load_train_config(train_file, ["wandb=True", "batch_size=8", "scheduler.cfg_scale=7.0"]).notes)
    assert "wandb" not in notes  # it has an effect
    assert "batch_size=8 has no effect" in notes
    assert "scheduler.cfg_scale=7.0 has no effect in training" in notes


def test_upstream_sampling_file_loads(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(UPSTREAM_SAMPLE)
    loaded = load_sample_config(path)
    config = loaded.config
    assert config.image_size == (240, 426) and not any("multi_resolution" in note for note in loaded.notes)
    notes = load_sample_config(path, ["multi_resolution=False"]).notes
    assert [note for note in notes if note not in loaded.notes] == [
        "multi_resolution=False has no effect: the model is always told the size of what it makes"
    ]
    assert config.prompt[1].startswith("two")
    assert config.reference_path == ["https://example.org/a.mp4", None]
    assert config.scheduler.get_keys()["cfg_channel"] == 3
    assert isinstance(load_any_config(path).config, SampleConfig)


def test_vae_dtype_and_builder_keys(train_file):
    config = load_train_config(train_file).config
    assert config.vae.get_keys() == {
        "type": "VideoAutoencoderKL",
        "from_pretrained": "some/vae",
        "micro_batch_size": 4,
        "latents": "sample",
        "local_files_only": True,
    }
    replaced = load_train_config(train_file, ["vae=dict(type='linear')", "text_encoder=dict(type='bytes')"]).config
    assert replaced.vae.get_keys() == {"type": "linear"}
    assert "from_pretrained" not in replaced.text_encoder.get_keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.depht=4", r"command line: model\.depht: unknown key; did you mean 'depth'\?"),
        ("model.enable_flash=True", r"did you mean 'enable_flash_attn'\?"),
        ("hidden_size=96", r"command line: hidden_size: unknown key; did you mean 'model\.hidden_size'\?"),
        ("from_pretrained=x", r"did you mean 'model\.from_pretrained' or 'vae\.from_pretrained' or 'text_encoder"),
        ("learning_rate=1e-4", r"learning_rate: unknown key; known: .*\blr\b"),
        ("bucket_confg={}", r"bucket_confg: unknown key; did you mean 'bucket_config'\?"),
        ("zzz=1", r"zzz: unknown key; known: dataset"),
        ("lr=fast", r"lr: .*number.*'fast'"),
        ("lr=-1", r"lr: .*greater than 0"),
        ("lr=1e999", r"lr: .*finite"),
        ("grad_clip=1e999", r"grad_clip: .*finite"),
        ("scheduler.cfg_scale=-1e999", r"scheduler\.cfg_scale: .*finite"),
        ("epochs=1.5", r"epochs: .*integer"),
        ("dtype=fp16", r"dtype: use 'bf16' or 'fp32'; fp16 is not supported"),
        ("sp_size=0", r"sp_size: .*greater than or equal to 1"),
        ("cpu_threads=100000", r"cpu_threads: .*less than or equal to 1024"),
        ("num_workers=100000", r"num_workers: .*less than or equal to 1024"),
        (f"seed={2**64}", r"seed: .*less than 18446744073709551616"),
        ("sp_size=3", r"sp_size=3: the 16 heads .* take a divisor of 16"),
        ("dataset.type=VideoTextDataset", r"dataset\.type: only 'VariableVideoTextDataset'"),
        ("dataset.image_size=(256, 256)", r"dataset\.image_size: must be None: bucket_config decides"),
        ("dataset.image_size=(None, 480)", r"dataset\.image_size: must be None: bucket_config decides"),
        ("dataset.num_frames=16", r"dataset\.num_frames: must be None"),
        ("dataset.transform_name=center", r"dataset\.transform_name: only 'resize_crop'"),
        ("dataset=3", r"dataset: .*dictionary"),
        # pydantic takes True for 1, and this for graphs of one token
        (
            "cuda_graph_tokens=True",
            r"command line: cuda_graph_tokens: write a number, this is no switch \(given: True\)",
        ),
        ("steps=False", r"steps: write a number"),
        ("lr=True", r"lr: write a number"),
        ("grad_clip=False", r"grad_clip: write a number"),
        ("vae.micro_batch_size=True", r"vae\.micro_batch_size: write a number"),
        ("grad_checkpoint=-1", r"grad_checkpoint: write True"),
        ("grad_checkpoint=half", r"grad_checkpoint: write True .*'half'"),
        (
            "vae.type=linear",
            r"vae: local_files_only, micro_batch_size would have no effect with type='linear'; "
            r"remove it, or set local_files_only=False, micro_batch_size=None",
        ),
        ("vae.type=nothing", r"vae\.type: .*'VideoAutoencoderKL'"),
        ("text_encoder.output_dim=32", r"text_encoder: output_dim would have no effect with type='t5'"),
        ("scheduler=dict(type='dpm-solver')", r"dpm-solver' only samples"),
        ("bucket_config={}", r"bucket_config is empty"),
        ("bucket_config.144p.16=3", r"bucket_config\.144p\.16: write \(keep probability, batch size\).*\(given: 3\)"),
        ("bucket_config.144p.16=(1.0,)", r"bucket_config\.144p\.16: write \(keep probability, batch size\)"),
        ("bucket_config.144p.16=(1.0, 'x')", r"bucket_config\.144p\.16"),
        ("bucket_config.144p.sixteen=(1.0, 2)", r"bucket_config\.144p\.sixteen"),
        ("mask_ratios.mask_non=0.1", r"mask_ratios: unknown mask 'mask_non'; did you mean 'mask_no'\?"),
        ("mask_ratios.mask_no=0.5", r"mask_ratios: the ratios sum to 0\.6"),
        ("mask_ratios.mask_no=2", r"mask_ratios: mask_no is 2"),
        ("mask_ratios.mask_no='0.9'", r"mask_ratios: mask_no is '0\.9'; a ratio is a number"),
        ("start_from_scratch=True", r"start_from_scratch=True needs `load`"),
        ("feature_draws=2", r"feature_draws=2 needs `features`"),
        ("features=''", r"features: .*at least 1 character"),  # not the current folder
        ("load=''", r"load: .*at least 1 character"),
    ],
)
def test_errors_name_the_key_and_the_fix(train_file, override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_train_config(train_file, [override])
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "lr=0",
        "grad_clip=-0.1",
        "epochs=0",
        "steps=-1",
        "log_every=0",
        "ckpt_every=-1",
        "keep_checkpoints=0",
        "num_workers=-1",
        "prefetch=-1",
        "cpu_threads=0",
        "feature_draws=0",
        "cuda_graph_tokens=-1",
        "ema_decay=-0.1",
        "ema_decay=1",
        "dataset.frame_interval=0",
        "vae.micro_batch_size=0",
        "text_encoder.model_max_length=0",
        "scheduler.diffusion_steps=0",
    ],
)
def test_a_number_out_of_its_range_is_refused(train_file, override):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^command line: {key}: .*(greater|less) than"):
        load_train_config(train_file, [override])


@pytest.mark.parametrize(
    "override",
    [
        "num_frames=0",
        "frame_interval=0",
        "fps=0",
        "start_index=-1",
        "end_index=-1",
        "num_sample=0",
        "loop=0",
        "condition_frame_length=0",
        "batch_size=0",
        "seed=-1",
        "cuda_graph_tokens=-1",
    ],
)
def test_a_number_of_sampling_out_of_its_range_is_refused(tmp_path, override):
    path = tmp_path / "sample.py"
    path.write_text(UPSTREAM_SAMPLE)
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^command line: {key}: .*greater than"):
        load_sample_config(path, [override])


@pytest.mark.parametrize(
    "override",
    [
        "seed=0",
        "grad_clip=0",
        "steps=0",
        "log_every=1",
        "ckpt_every=0",
        "keep_checkpoints=1",
        "num_workers=0",
        "prefetch=0",
        "num_workers=1024",
        "cpu_threads=1",
        "cuda_graph_tokens=1",
        "grad_checkpoint=0",
        "ema_decay=0",
        "mask_ratios={'mask_no': 1.0, 'mask_image_head': 0}",
    ],
)
def test_the_ends_of_a_range_belong_to_it(train_file, override):
    load_train_config(train_file, [override])


def test_a_mistake_is_told_once(train_file):
    with pytest.raises(ValueError) as caught:
        load_train_config(train_file, ["bucket_config.144p.16=(1.0, 'x')"])  # a number or a tuple of them would do
    assert str(caught.value).count("\n") == 0


def test_errors_name_the_line(train_file):
    train_file.write_text(UPSTREAM_TRAIN + "model_depth = 3\n")
    line = len(train_file.read_text().splitlines())
    with pytest.raises(ValueError, match=rf"stage\.py, line {line}: model_depth: unknown key"):
        load_train_config(train_file)


def test_a_file_of_the_other_kind_is_named_as_such(train_file, tmp_path):
    with pytest.raises(ValueError, match="stage.py is a configuration for training .* such as the shipped sample"):
        load_sample_config(train_file)
    path = tmp_path / "sample.py"
    path.write_text(UPSTREAM_SAMPLE)
    with pytest.raises(ValueError, match="sample.py is a configuration for sampling .* such as the shipped stage1"):
        load_train_config(path)


def test_several_errors_are_listed_at_once(train_file):
    with pytest.raises(ValueError) as caught:
        load_train_config(train_file, ["lr=x", "seeds=1"])
    assert "lr:" in str(caught.value) and "seeds: unknown key; did you mean 'seed'?" in str(caught.value)


def test_missing_key(tmp_path):
    path = tmp_path / "empty.py"
    for text in ("dataset = dict()\n", "lr = 1e-4\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="bucket_config: is missing"):
            load_train_config(path)


def test_weights_to_start_from_are_named_once(train_file):
    assert load_train_config(train_file, ["load=runs/a", "start_from_scratch=True"]).config.start_from_scratch
    assert load_train_config(train_file, ["model.from_pretrained=some/model"]).config.load is None
    with pytest.raises(ValueError, match="load and model.from_pretrained both name weights"):
        load_train_config(train_file, ["load=runs/a", "model.from_pretrained=some/model"])


def test_sampling_has_the_guidance_of_open_sora_where_nothing_is_given(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text("image_size = (240, 426)\n")
    scheduler = load_sample_config(path).config.scheduler
    assert (scheduler.num_sampling_steps, scheduler.cfg_scale, scheduler.cfg_channel) == (100, 7.0, 3)


def test_alias_beside_its_name(train_file):
    with pytest.raises(ValueError, match="both are given"):
        load_train_config(train_file, ["model.enable_flash_attn=True"])


def test_origins(train_file):
    loaded = load_train_config(
        train_file, ["bucket_config.144p.16=(1.0, 3)", "lr=1e-4"], {"dataset.data_path": "m.csv", "steps": None}
    )
    assert loaded.config.dataset.data_path == "m.csv"
    lines = UPSTREAM_TRAIN.splitlines()
    number = next(index for index, line in enumerate(lines, 1) if line.startswith("seed"))
    assert loaded.get_origin("seed") == f"stage.py:{number}"
    assert loaded.get_origin("lr") == "command line"
    assert loaded.get_origin("dataset.data_path") == "command line"
    assert loaded.get_origin("steps") == "default"
    assert loaded.get_origin("model.depth") == "default"
    assert loaded.get_origin("bucket_config").endswith("command line (bucket_config.144p.16)")
    number = next(index for index, line in enumerate(lines, 1) if "enable_flashattn" in line)
    assert loaded.get_origin("model.enable_flash_attn") == f"stage.py:{number}"
    whole = load_train_config(train_file, ["bucket_config={'144p': {16: (1.0, 3)}}", "bucket_config.144p.16=(1.0, 4)"])
    assert whole.get_origin("bucket_config") == "command line"
    section = load_train_config(train_file, ["model={'type': 'STDiT2-XL/2'}"], {"steps": 0})
    assert section.get_origin("model.type") == section.get_origin("steps") == "command line"
    assert section.get_origin("model.input_sq_size") == "default" and section.config.steps == 0
    assert {key for key, _ in list_values(loaded.config)} > {"seed", "model.depth", "bucket_config", "vae.type"}


def test_an_option_may_be_of_a_section_that_is_not_in_the_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text('bucket_config = {"144p": {16: (1.0, 2)}}\n')
    loaded = load_train_config(path, options={"dataset.data_path": "m.csv"})
    assert loaded.config.dataset.data_path == "m.csv"


def test_only_the_keys_of_a_section_s_type_are_listed(train_file):
    config = load_train_config(train_file, ["vae=dict(type='linear')"]).config
    assert [key for key, _ in list_values(config) if key.startswith("vae.")] == ["vae.type", "vae.from_pretrained"]


def test_json_of_a_run_loads_back(train_file, tmp_path):
    config = load_train_config(train_file).config
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    loaded = load_train_config(path)
    assert loaded.config == config
    assert loaded.get_origin("seed") == "config.json"


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3", "image", "video"])
def test_shipped_training_configurations_carry_the_published_values(name):
    facts = json.loads(FACTS.read_text())[name]
    config = load_train_config(CONFIGS / f"{name}.py").config
    tables = {
        resolution: {str(frames): list(entry) for frames, entry in entries.items()}
        for resolution, entries in config.bucket_config.items()
    }
    assert tables == facts.pop("bucket_config")
    assert config.dataset.frame_interval == facts.pop("frame_interval")
    for key, value in facts.items():
        assert getattr(config, key) == value, key
    assert config.model.qk_norm and config.model.input_sq_size == 512
    assert config.text_encoder.model_max_length == 200
    assert config.ema_decay == 0.9999


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path):
    assert isinstance(load_any_config(path).config, (TrainConfig, SampleConfig))


def test_model_keys_and_defaults_are_those_of_the_model():
    given_by_encoders = {"input_size", "in_channels", "caption_channels", "model_max_length"}
    model_defaults = {
        name: field.default for name, field in STDiT2Config.model_fields.items() if name not in given_by_encoders
    }
    assert ModelConfig().get_shape_keys() == model_defaults
