"""The real loading code of T5 and its tokenizer, on a small one with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_fast.encoders import build_text_encoder
from opensora_fast.encoders.captions import clean_caption
from opensora_fast.encoders.t5 import PlainT5Norm, T5Encoder, use_plain_norms

CAPTIONS = ["A red dog RUNS over the lawn", "the old white lawn", "", "trees " * 50]


def build(folder: Path, dtype: torch.dtype = torch.float32, **keys) -> T5Encoder:
    config = {"type": "t5", "from_pretrained": str(folder), "model_max_length": 24, "local_files_only": True}
    return build_text_encoder(config | keys, dtype=dtype)


def test_tokens_are_those_of_sentencepiece(t5_folder: Path):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    tokenizer = build(t5_folder).tokenizer
    for text in [*CAPTIONS, "ＡＢ ﬁsh  dog", " spaces  inside "]:
        assert tokenizer(clean_caption(text)).input_ids == [*pieces.encode(clean_caption(text)), 1]


def test_encode_is_t5_on_the_padded_tokens(t5_folder: Path):
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = build(t5_folder)
    encoding = encoder.encode(CAPTIONS)
    y, mask = encoding["y"], encoding["mask"]
    assert y.shape == (4, 1, 24, 32) and encoder.output_dim == 32 and encoder.model_max_length == 24
    assert mask.shape == (4, 24) and mask.dtype == torch.int64 and mask.device.type == "cpu"
    assert mask.sum(1).tolist()[2:] == [1, 24]  # the end token of an empty caption; a long caption is cut

    model = T5EncoderModel.from_pretrained(str(t5_folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(t5_folder))
    for i, caption in enumerate(CAPTIONS):
        tokens = tokenizer(clean_caption(caption), max_length=24, truncation=True, return_tensors="pt").input_ids
        assert mask[i].tolist() == [1] * tokens.shape[1] + [0] * (24 - tokens.shape[1])
        with torch.no_grad():
            alone = model(input_ids=tokens).last_hidden_state[0]
        torch.testing.assert_close(y[i, 0, : tokens.shape[1]], alone, rtol=1e-4, atol=1e-5)


def test_encoding_asks_for_no_number_which_a_gpu_would_have_to_be_waited_for(t5_folder: Path):
    asked = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten._local_scalar_dense.default:
                asked.append(op)
            return op(*args, **(kwargs or {}))

    encoder = build(t5_folder)
    with Listener():
        encoder.encode(CAPTIONS)
        assert not asked
        encoder.encode(["trees " * 50])["y"].sum().item()  # no padding; and the listener hears a question
    assert len(asked) == 1


def test_captions_are_cleaned_twice(t5_folder: Path):
    cleaned, raw = build(t5_folder), build(t5_folder, clean_captions=False)
    caption = "A%2520Red <b>dog</b>"
    assert torch.equal(cleaned.encode([caption])["y"], raw.encode(["a red dog"])["y"])
    assert not torch.equal(raw.encode([caption])["y"], raw.encode(["a red dog"])["y"])


def test_bfloat16_reaches_every_weight(t5_folder: Path):
    encoder = build(t5_folder, torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    y, exact = encoder.encode(CAPTIONS)["y"], build(t5_folder).encode(CAPTIONS)["y"]
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.03


def test_is_frozen(t5_folder: Path):
    encoder = build(t5_folder)
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    assert torch.equal(encoder.encode(CAPTIONS)["y"], encoder.encode(CAPTIONS)["y"])


def test_shardformer_is_taken_with_a_warning(t5_folder: Path):
    with pytest.warns(UserWarning, match="shardformer"):
        build(t5_folder, shardformer=True)


def test_weights_in_a_bin_file(t5_folder: Path, tmp_path: Path):
    """The released T5 comes as pytorch_model.bin."""
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(load_file(t5_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(build(tmp_path).encode(CAPTIONS)["y"], build(t5_folder).encode(CAPTIONS)["y"])


def test_a_bin_file_is_not_executed(t5_folder: Path, tmp_path: Path, code: object):
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": code}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could execute code, so they are refused"):
        build(tmp_path)


def test_sharded_weights(t5_folder: Path, tmp_path: Path):
    from transformers import T5EncoderModel

    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    T5EncoderModel.from_pretrained(str(t5_folder)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(build(tmp_path).encode(CAPTIONS)["y"], build(t5_folder).encode(CAPTIONS)["y"])


def test_missing_weights_are_an_error(t5_folder: Path, tmp_path: Path):
    """transformers itself leaves them random."""
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(t5_folder / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight"):
        build(tmp_path)


def test_weights_that_the_configuration_has_no_place_for_are_an_error(t5_folder: Path, tmp_path: Path):
    """transformers itself leaves them out: the encoder would be cut short."""
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    keys = json.loads((t5_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"num_layers": 1}))
    with pytest.raises(ValueError, match=r"no place for 9 of them, among them encoder\.block\.1\.layer\.0\."):
        build(tmp_path)


def test_the_decoder_and_second_names_beside_the_encoder_are_left_out(t5_folder: Path, tmp_path: Path):
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(t5_folder / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights["shared.weight"].clone()
    weights["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(32, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(build(tmp_path).encode(CAPTIONS)["y"], build(t5_folder).encode(CAPTIONS)["y"])


@pytest.mark.parametrize("content", [b"\x00garbage", b"", b"[]"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "spiece.model", "tokenizer.json"])
def test_broken_files_are_named(t5_folder: Path, tmp_path: Path, name: str, content: bytes):
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="text_encoder.from_pretrained"):
        build(tmp_path)


def test_a_tokenizer_of_another_model_is_an_error(t5_folder: Path, tmp_path: Path):
    from transformers import T5Config, T5EncoderModel

    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    keys = json.loads((t5_folder / "config.json").read_text()) | {"vocab_size": 20}
    T5EncoderModel(T5Config(**keys)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not belong together"):
        build(tmp_path)


@pytest.mark.parametrize("texts", ["a dog", [], [None], [b"a dog"]])
def test_wrong_texts_are_refused(t5_folder: Path, texts):
    with pytest.raises(ValueError, match="list of strings"):
        build(t5_folder).encode(texts)


def test_wrong_length_is_refused(t5_folder: Path):
    with pytest.raises(ValueError, match="model_max_length"):
        build(t5_folder, model_max_length=0)


def test_apex_norms_are_replaced(t5_folder: Path):
    """With apex importable, transformers 4 builds T5 from apex's norm, which rounds elsewhere."""

    class FusedRMSNorm(torch.nn.Module):
        def __init__(self, weight: torch.nn.Parameter, eps: float):
            super().__init__()
            self.weight, self.eps = weight, eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normalized = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
            return (self.weight.float() * normalized).to(x.dtype)

    FusedRMSNorm.__module__ = "apex.normalization"
    encoder = build(t5_folder, torch.bfloat16)
    expected = encoder.encode(CAPTIONS)["y"]
    own = {name: module for name, module in encoder.model.named_modules() if type(module).__name__ == "T5LayerNorm"}
    assert len(own) == 5
    for name, module in own.items():
        torch.nn.init.uniform_(module.weight, 0.5, 2.0)
        encoder.model.set_submodule(name, FusedRMSNorm(module.weight, module.variance_epsilon))
    with_apex = encoder.encode(CAPTIONS)["y"]
    assert use_plain_norms(encoder.model) == 5
    plain = encoder.encode(CAPTIONS)["y"]
    assert {type(encoder.model.get_submodule(name)) for name in own} == {PlainT5Norm}
    for name, module in own.items():
        encoder.model.set_submodule(name, module)
    assert torch.equal(plain, encoder.encode(CAPTIONS)["y"])  # to the bit what transformers computes without apex
    assert not torch.equal(plain, with_apex) and not torch.equal(plain, expected)
    assert use_plain_norms(encoder.model) == 0
