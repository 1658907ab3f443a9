"""The linear autoencoder: optimal within its 4 components, unit-variance latents."""

from pathlib import Path

import pytest
import torch

from opensora_fast.encoders import build_video_encoder
from opensora_fast.encoders.linear_autoencoder import LinearAutoencoder


def natural_clip(seed: int, frames: int = 3, height: int = 96, width: int = 120) -> torch.Tensor:
    """[3, T, H, W] in [-1, 1] with what pictures have in common: amplitudes that fall with the frequency, and
    colors that mostly go together."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    amplitude = (rows**2 + columns**2).clamp(min=1 / width**2) ** -0.75
    spectrum = torch.fft.rfft2(torch.randn(3, frames, height, width, generator=generator)) * amplitude
    planes = torch.fft.irfft2(spectrum, s=(height, width))
    planes = planes / planes.std() * torch.tensor([0.35, 0.08, 0.05])[:, None, None, None]
    mixing = torch.tensor([[1.0, 1.0, 0.4], [1.0, 0.0, -0.9], [1.0, -1.0, 0.5]])
    return (torch.einsum("ij,jthw->ithw", mixing, planes) + 0.1).clamp(-1, 1)


@pytest.fixture(scope="module")
def fitted() -> LinearAutoencoder:
    return LinearAutoencoder.fit(natural_clip(seed) for seed in range(8))


def test_latents_have_unit_variance(fitted: LinearAutoencoder):
    latents = torch.cat([fitted.encode(natural_clip(seed)[None]) for seed in range(8)])
    channels = latents.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(channels.mean(1), torch.zeros(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(channels @ channels.T / channels.shape[1], torch.eye(4).double(), rtol=0, atol=1e-3)


def test_reconstruction_error_is_what_the_components_leave(fitted: LinearAutoencoder):
    clips = torch.stack([natural_clip(seed) for seed in range(8)])
    error = (fitted.decode(fitted.encode(clips)) - clips).square().mean()
    patches = clips.unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).movedim((1, 4, 6), (4, 5, 6)).flatten(4)
    variance = (patches - patches.mean((0, 1, 2, 3))).square().mean()
    assert error / variance == pytest.approx(1 - fitted.explained_variance, rel=1e-3)


def test_other_pictures_stay_recognizable(fitted: LinearAutoencoder):
    """Pictures it was not fitted on: a signal-to-noise ratio over 20 dB (peak) and most of the variance."""
    clip = natural_clip(99)[None]
    error = (fitted.decode(fitted.encode(clip)) - clip).square().mean()
    assert 10 * torch.log10(4 / error) > 20
    assert error < 0.15 * clip.var()


def test_no_other_4_components_do_better(fitted: LinearAutoencoder):
    clips = torch.stack([natural_clip(seed) for seed in range(8)])
    own = (fitted.decode(fitted.encode(clips)) - clips).square().mean()
    for seed in range(3):
        noise = torch.randn(4, 192, generator=torch.Generator().manual_seed(seed))
        nearby = torch.linalg.qr((fitted.components + 0.01 * noise).T)[0].T
        other = LinearAutoencoder(fitted.mean, nearby, fitted.std, 0.0)
        assert (other.decode(other.encode(clips)) - clips).square().mean() > own


def test_decode_inverts_encode(fitted: LinearAutoencoder):
    latents = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fitted.encode(fitted.decode(latents)), latents, rtol=1e-4, atol=1e-4)


def test_a_patch_goes_to_its_place(fitted: LinearAutoencoder):
    clip = torch.zeros(1, 3, 2, 24, 32)
    clip[0, 0, 1, 8:16, 16:24] = 1  # frame 1, latent row 1, column 2
    changed = (fitted.encode(clip) - fitted.encode(torch.zeros_like(clip))).abs().sum(1)[0] > 1e-4
    assert changed.nonzero().tolist() == [[1, 1, 2]]


def test_sizes_are_rounded_down(fitted: LinearAutoencoder):
    clip = natural_clip(0, height=45, width=66)[None]
    assert fitted.get_latent_size((3, 45, 66)) == [3, 5, 8] and fitted.get_latent_size((None, 8, None)) == [
        None,
        1,
        None,
    ]
    latents = fitted.encode(clip)
    assert latents.shape == (1, 4, 3, 5, 8)
    assert torch.equal(latents, fitted.encode(clip[..., :40, :64]))
    assert fitted.decode(latents).shape == (1, 3, 3, 40, 64)


def test_clips_may_come_one_by_one_or_as_a_batch():
    clips = [natural_clip(seed) for seed in range(4)]
    one_by_one, batch = LinearAutoencoder.fit(clips), LinearAutoencoder.fit([torch.stack(clips)])
    torch.testing.assert_close(batch.components, one_by_one.components, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(batch.std, one_by_one.std)


def test_saved_and_loaded(fitted: LinearAutoencoder, tmp_path: Path):
    fitted.save_pretrained(tmp_path / "new" / "folder")
    loaded = build_video_encoder({"type": "linear", "from_pretrained": str(tmp_path / "new" / "folder")})
    clip = natural_clip(3)[None]
    assert torch.equal(loaded.encode(clip), fitted.encode(clip))
    assert loaded.explained_variance == fitted.explained_variance and loaded.out_channels == 4


def test_bfloat16_is_rounded_once(fitted: LinearAutoencoder, tmp_path: Path):
    fitted.save_pretrained(tmp_path)
    loaded = build_video_encoder({"type": "linear", "from_pretrained": tmp_path}, dtype=torch.bfloat16)
    clip = natural_clip(3)[None]
    assert torch.equal(loaded.encode(clip), fitted.encode(clip).bfloat16())
    assert loaded.decode(loaded.encode(clip)).dtype == torch.bfloat16


def test_clips_of_one_color_do_not_blow_up_noise():
    """Three directions hold everything; the fourth channel stays near 0 instead of showing rounding errors."""
    colors = torch.rand(200, 3, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clips = colors.expand(200, 3, 1, 8, 8)
    autoencoder = LinearAutoencoder.fit([clips])
    latents = autoencoder.encode(clips)
    assert latents[:, 3].abs().max() < 1e-2
    torch.testing.assert_close(autoencoder.decode(latents), clips.contiguous(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "clips, message",
    [
        ([], "no clip"),
        ([torch.zeros(3, 2, 16, 16)], "nothing to encode"),
        ([torch.full((3, 2, 16, 16), float("nan"))], "not finite"),
        ([torch.zeros(3, 2, 16, 16, dtype=torch.uint8)], "floating point"),
        ([torch.zeros(2, 16, 16)], r"\[B, 3, T, H, W\]"),
    ],
)
def test_what_cannot_be_fitted_is_refused(clips: list[torch.Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        LinearAutoencoder.fit(clips)


def test_wrong_folders_are_named(fitted: LinearAutoencoder, tmp_path: Path):
    with pytest.raises(ValueError, match=r"LinearAutoencoder\.fit"):
        build_video_encoder({"type": "linear"})
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        build_video_encoder({"type": "linear", "from_pretrained": str(tmp_path)})
    fitted.save_pretrained(tmp_path)
    for name in ("config.json", "linear_autoencoder.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(ValueError, match="holds no linear autoencoder"):
            build_video_encoder({"type": "linear", "from_pretrained": str(tmp_path)})
        fitted.save_pretrained(tmp_path)
