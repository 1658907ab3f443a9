"""A step asks the device for no number: the host would wait for all that it has been given to do.

The meta device stands in for a GPU. It has no values, so asking for one is an error.
"""

import dataclasses

import pytest
import torch
from toy_steps import MASKS, SHAPES, make_batch, make_model, make_trainer

from opensora_fast import STDiT2Config
from opensora_fast.diffusion import IDDPM, MaskGenerator, SpeeDiffusion
from opensora_fast.encoders.byte_text import ByteTextEncoder
from opensora_fast.encoders.linear_autoencoder import LinearAutoencoder
from opensora_fast.train.inputs.model_inputs import ModelInputs
from opensora_fast.train.step.losses import compute_losses, draw_inputs

META = torch.device("meta")


@pytest.fixture
def without_autocast(monkeypatch):
    """Autocast does not know the meta device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


@pytest.mark.parametrize("diffusion", [IDDPM(), SpeeDiffusion()], ids=["iddpm", "iddpm-speed"])
def test_a_training_step_asks_for_no_number(without_autocast, diffusion):
    model = make_model("meta")
    model.set_checkpointing(1)
    for number, shape in enumerate(SHAPES):
        batch = make_batch(number, shape, model.config)
        inputs = draw_inputs(model, diffusion, MaskGenerator(MASKS), *ModelInputs(None, None, META).prepare(batch))
        losses = compute_losses(model, diffusion, inputs)
        losses["loss"].backward()
        assert losses["loss"].is_meta and inputs["mask"].device.type == "cpu"
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_of_a_batch_only_what_is_known_of_it_stays_when_its_inputs_are_made(tmp_path):
    trainer = make_trainer(tmp_path, 1)
    batch = make_batch(0, SHAPES[0], trainer.model.config)
    trainer.compute_losses(batch, 1)
    assert batch.latents is None and batch.text_embeddings is None
    assert len(batch) == 2 and batch.text == ["x"] * 2


def test_encoding_a_batch_of_clips_asks_for_no_number():
    text_encoder = ByteTextEncoder(model_max_length=24).to(META)
    autoencoder = LinearAutoencoder(torch.zeros(192), torch.eye(4, 192), torch.ones(4), 1.0).to(META)
    batch = make_batch(0, (2, 3, 4, 4), STDiT2Config.small())
    clips = dataclasses.replace(batch, video=torch.zeros(2, 3, 3, 32, 32), latents=None, text=["a rabbit", "é" * 24])
    latents, conditions = ModelInputs(autoencoder, text_encoder, META).prepare(clips)
    assert latents.is_meta and latents.shape == (2, 4, 3, 4, 4) and conditions["y"].is_meta


@pytest.mark.parametrize(
    ("options", "parts"),
    [({}, {"mse", "vb"}), ({"learn_sigma": False}, {"mse"}), ({"use_kl": True}, {"vb"})],
    ids=["learned variance", "fixed variance", "bound alone"],
)
def test_the_losses_are_those_of_the_diffusion(options, parts):
    model, diffusion = make_model(pred_sigma=options.get("learn_sigma", True)), IDDPM(**options)
    prepared = ModelInputs(None, None, torch.device("cpu")).prepare(make_batch(0, SHAPES[0], model.config))
    losses = compute_losses(model, diffusion, draw_inputs(model, diffusion, None, *prepared))
    assert losses.keys() == {"loss", *parts} and all(loss.shape == () for loss in losses.values())


@pytest.mark.parametrize(("probability", "training"), [(0.4, True), (0.4, False), (0.0, True)])
def test_captions_are_dropped_in_training_where_the_model_has_a_probability_for_it(probability, training):
    model = make_model(class_dropout_prob=probability).train(training)
    prepared = ModelInputs(None, None, torch.device("cpu")).prepare(make_batch(0, SHAPES[0], model.config))
    inputs = draw_inputs(model, IDDPM(), None, *prepared)
    assert ("dropped" in inputs) == (training and probability > 0)
