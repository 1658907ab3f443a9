"""From a batch of clips or cached features to what the model takes."""

import torch
from torch import Tensor

from opensora_fast.data.batch import Batch
from opensora_fast.encoders import TextEncoder, VideoEncoder


class ModelInputs:
    """Encodes clips and captions, or passes on features that were encoded before.

    Args:
        video_encoder, text_encoder: None when batches carry latents and text embeddings.
        device: of the model.
    """

    def __init__(
        self, video_encoder: VideoEncoder | None, text_encoder: TextEncoder | None, device: torch.device
    ) -> None:
        self.video_encoder = video_encoder
        self.text_encoder = text_encoder
        self.device = device

    @torch.no_grad()
    def prepare(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents float32 [B, 4, T, h, w] on the device and the model's other arguments, which may lie on the host."""
        if batch.latents is not None:
            latents = batch.latents
            text = {"y": batch.text_embeddings, "mask": batch.text_mask}
        else:
            latents = self.video_encoder.encode(batch.video.to(self.device, non_blocking=True))
            text = dict(self.text_encoder.encode(batch.text))
        conditions = {name: getattr(batch, name) for name in ("num_frames", "height", "width", "ar", "fps")}
        latents = latents.to(self.device, torch.float32, non_blocking=True)
        return latents, {"y": text["y"].to(self.device, non_blocking=True), "mask": text["mask"], **conditions}
