"""Small models with random weights, written in the formats in which the released ones are distributed."""

import io
import json
from pathlib import Path

import pytest
import torch

WORDS = {
    "color": "red blue green brown black white".split(),
    "age": "old new wet dry".split(),
    "does": "barks jumps sleeps plays".split(),
}


def caption_texts() -> list[str]:
    return [
        f"a {color} dog runs over the {age} lawn, and {does} happily near {count} trees"
        for color in WORDS["color"]
        for age in WORDS["age"]
        for does in WORDS["does"]
        for count in range(5)
    ]


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderKL of the layout of sd-vae-ft-ema (three halvings, 4 latent channels), a few channels wide."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            layers_per_block=1,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 1.1 encoder and its sentencepiece tokenizer, with the files of DeepFloyd/t5-v1_1-xxl."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(
            T5Config(
                vocab_size=64,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        ).save_pretrained(folder)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(caption_texts()),
        model_writer=pieces,
        vocab_size=46,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(4)]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": extra}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"extra_ids": len(extra), "model_max_length": 512, "tokenizer_class": "T5Tokenizer"})
    )
    return folder
