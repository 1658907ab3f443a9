"""Configuration dicts, and where weights are looked for."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opensora_fast.encoders import build_text_encoder, build_video_encoder, choose_text_dtype, fingerprint_weights
from opensora_fast.encoders.vae import NEEDS
from opensora_fast.pretrained import locate_pretrained


@pytest.mark.parametrize(
    "build, config, message",
    [
        (build_video_encoder, {"type": "VideoAutoEncoderKL"}, "did you mean 'VideoAutoencoderKL'"),
        (build_video_encoder, {"type": "t5"}, "known: VideoAutoencoderKL, linear"),
        (build_video_encoder, {}, r"vae\.type is missing"),
        (build_video_encoder, "linear", "must be a dict"),
        (build_video_encoder, {"type": "VideoAutoencoderKL", "micro_batchsize": 4}, "did you mean 'micro_batch_size'"),
        (build_video_encoder, {"type": "linear", "micro_batch_size": 4}, r"vae\.micro_batch_size: unknown key"),
        (build_video_encoder, {"type": "linear", "device": "cpu"}, r"vae\.device: unknown key"),
        (build_text_encoder, {"type": "T5"}, "did you mean 't5'"),
        (build_text_encoder, {"type": "t5", "max_length": 4}, r"text_encoder\.max_length: .*'model_max_length'"),
        (build_text_encoder, {"type": "t5"}, r"from_pretrained is missing: .*DeepFloyd/t5-v1_1-xxl"),
        (build_text_encoder, {"type": "bytes", "from_pretrained": "x"}, r"text_encoder\.from_pretrained: unknown key"),
    ],
)
def test_wrong_configurations_are_named(build, config, message: str):
    with pytest.raises(ValueError, match=message):
        build(config)


def test_the_configuration_is_not_changed():
    config = {"type": "bytes", "model_max_length": 8}
    build_text_encoder(config)
    assert config == {"type": "bytes", "model_max_length": 8}


def test_importing_is_light():
    code = (
        "import sys, opensora_fast.encoders as e\n"
        "import opensora_fast.encoders.vae, opensora_fast.encoders.t5, opensora_fast.encoders.captions\n"
        "import opensora_fast.encoders.byte_text, opensora_fast.encoders.linear_autoencoder\n"
        "heavy = {'transformers', 'diffusers', 'huggingface_hub', 'ftfy', 'bs4'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def locate(source, **keys) -> Path:
    return locate_pretrained("vae", source, NEEDS, example="stabilityai/sd-vae-ft-ema", **keys)


def fake_cache(cache: Path, hub_id: str, names: list[str]) -> Path:
    """The files of `hub_id` as the Hugging Face cache lays them out."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for name in names:
        (snapshot / name).write_text("{}")
    return snapshot


FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


def test_local_folder(tmp_path: Path):
    for name in FILES:
        (tmp_path / name).write_text("{}")
    assert locate(tmp_path) == tmp_path and locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: copy it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a pointer of Git LFS: `git lfs pull`",
        ),
    ],
)
def test_a_file_that_holds_nothing_is_named(tmp_path: Path, content: bytes, message: str):
    for name in FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / FILES[1]).write_bytes(content)
    with pytest.raises(ValueError, match=rf"lacks its weights \(.*, but {FILES[1]} {message}"):
        locate(tmp_path)


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "from_pretrained is missing"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("./checkpoints", "there is no folder checkpoints"),
        ("models/vae/ema", "there is no folder models/vae/ema"),
        (__file__, "is a file"),
        (Path(__file__).parent, r"lacks its configuration \(config.json\); its weights"),
    ],
)
def test_what_is_no_folder_of_weights_is_named(source, message: str):
    with pytest.raises(ValueError, match=message):
        locate(source)


def test_cached_files_are_used_without_network(tmp_path: Path):
    snapshot = fake_cache(tmp_path, "some/vae", FILES)
    for local_files_only in (True, False):
        assert locate("some/vae", cache_dir=tmp_path, local_files_only=local_files_only) == snapshot


def test_weights_have_a_fingerprint_wherever_they_lie(tmp_path: Path):
    """A few places of a large file tell two trainings apart; what an encoder does not read does not count."""
    generator = torch.Generator().manual_seed(0)
    contents = [torch.randn(1_000_000, generator=generator).numpy().tobytes() for _ in range(2)]
    folder, snapshot = tmp_path / "vae", fake_cache(tmp_path / "cache", "some/vae", [])
    for place in (folder, snapshot):
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text("{}")
        (place / "diffusion_pytorch_model.safetensors").write_bytes(contents[0])
    config = {"type": "VideoAutoencoderKL", "from_pretrained": str(folder)}
    first = fingerprint_weights(config)
    cached = {"from_pretrained": "some/vae", "cache_dir": tmp_path / "cache"}
    assert first and first == fingerprint_weights(config | cached)
    (folder / "README.md").write_text("read me")
    assert fingerprint_weights(config) == first
    for name, other in (("config.json", b"{ }"), ("diffusion_pytorch_model.safetensors", contents[1])):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(other)
        assert fingerprint_weights(config) not in (first, None)
        (folder / name).write_bytes(kept)
    assert fingerprint_weights(config) == first


def test_what_is_not_here_or_has_no_weights_has_no_fingerprint(tmp_path: Path):
    for source in ("nobody/nothing", str(tmp_path / "nowhere"), str(tmp_path), None):
        assert fingerprint_weights({"type": "t5", "from_pretrained": source, "cache_dir": str(tmp_path)}) is None
    assert fingerprint_weights({"type": "bytes"}) is None


@pytest.mark.parametrize("cached, lacking", [([], "every file|its configuration"), (FILES[:1], "its weights")])
def test_local_files_only_says_what_to_do(tmp_path: Path, cached: list[str], lacking: str):
    if cached:
        fake_cache(tmp_path, "some/vae", cached)
    with pytest.raises(ValueError, match=rf"'some/vae' is no folder.* lacks ({lacking}).*hf download some/vae"):
        locate("some/vae", cache_dir=tmp_path, local_files_only=True)


def test_a_download_is_announced_and_holds_only_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    import huggingface_hub

    on_hub = {"config.json": 500, "README.md": 9, "unet/config.json": 7, "diffusion_pytorch_model.bin": 2_000_000_000}
    on_hub["diffusion_pytorch_model.safetensors"] = 1_250_000_000
    asked = {}

    def model_info(self, hub_id: str, files_metadata: bool) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in on_hub.items()])

    def snapshot_download(hub_id: str, cache_dir: Path, local_files_only: bool = False, allow_patterns=()) -> str:
        if local_files_only:
            raise FileNotFoundError("not cached")
        asked["files"] = allow_patterns
        return str(fake_cache(cache_dir, hub_id, allow_patterns))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    locate("some/vae", cache_dir=tmp_path)
    assert asked["files"] == FILES
    assert "downloading some/vae" in (said := capsys.readouterr().err) and "1.25 GB in 2 files" in said


def test_no_network_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def model_info(self, hub_id: str, files_metadata: bool):
        raise RuntimeError("Name or service not known\nand more lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(
        ValueError, match=r"'some/vae'.*could not be downloaded \(RuntimeError: Name or.*known\)"
    ) as error:
        locate("some/vae", cache_dir=tmp_path)
    assert "\n" not in str(error.value) and "hf download some/vae" in str(error.value)


def test_both_defaults_go_together():
    """The offline pair: what the demo trains with."""
    from opensora_fast.encoders.linear_autoencoder import LinearAutoencoder

    video = torch.rand(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert LinearAutoencoder.fit([video]).encode(video).shape == (1, 4, 2, 4, 4)


@pytest.mark.parametrize(("shardformer", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_text_is_encoded_in_float32_unless_shardformer_asks_for_half_precision(shardformer, expected):
    assert choose_text_dtype(shardformer, torch.bfloat16) == expected
