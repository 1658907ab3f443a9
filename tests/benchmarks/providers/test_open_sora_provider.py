"""Open-Sora's own model as a provider; a class of this project's with its signature stands in for the package."""

import sys
from types import SimpleNamespace

import pytest
import torch

from opensora_fast.benchmarks.measuring import provider
from opensora_fast.benchmarks.providers import open_sora
from opensora_fast.benchmarks.providers.model_work import make_model_work, make_training
from opensora_fast.benchmarks.providers.models import model_provider, model_results, training_call
from opensora_fast.benchmarks.providers.upstream import UpstreamSTDiT2
from opensora_fast.benchmarks.providers.variants import VARIANT_OF
from opensora_fast.benchmarks.shapes import Workload
from opensora_fast.model import STDiT2Config


class StandIn(UpstreamSTDiT2):
    """Takes the sizes of videos on its own device and in its own dtype only, as upstream does."""

    built: list["StandIn"] = []

    def __init__(self, config: SimpleNamespace):
        keys = dict(vars(config))
        unused = {"enable_flash_attn": False, "enable_layernorm_kernel": False}
        super().__init__(STDiT2Config(**keys | unused), flash=keys["enable_flash_attn"])
        self.enable_layernorm_kernel = keys["enable_layernorm_kernel"]
        self.built.append(self)

    def forward(self, x, timestep, y, mask, num_frames, height, width, ar, fps):
        for size in (num_frames, height, width, ar, fps):
            assert size.dtype == self.x_embedder.proj.weight.dtype and size.device == x.device
        return super().forward(x, timestep, y, mask, None, num_frames, height, width, ar, fps)


@pytest.fixture
def installed(monkeypatch):
    library = SimpleNamespace(STDiT2=StandIn, STDiT2Config=SimpleNamespace)
    monkeypatch.setitem(sys.modules, open_sora.MODULE, library)
    for package in ("opensora", "opensora.models", "opensora.models.stdit"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(__path__=[]))
    monkeypatch.setattr(StandIn, "built", [])


@pytest.fixture(scope="module")
def work():
    training = make_training(STDiT2Config.small(upstream_rounding=False), "cpu", torch.float32)
    return make_model_work(training.model, Workload("144p", 2, 2), 5, training)


@pytest.mark.parametrize("name", ["open-sora", "open-sora-flash"])
def test_its_own_model_computes_on_the_parameters_of_the_work(installed, work, name):
    bound = model_provider(VARIANT_OF[name]).prepare(work)
    (view,) = StandIn.built
    own = dict(work.model.named_parameters())
    shared = {key.replace(".block.", "."): parameter for key, parameter in view.named_parameters()}
    assert shared.keys() == own.keys() and all(shared[key] is own[key] for key in own)
    assert [block.block.flash for block in view.blocks] == [name == "open-sora-flash"] * 2
    results, _ = model_results(bound, work)
    expected, _ = model_results(model_provider(VARIANT_OF["upstream"]).prepare(work), work)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)
    before = [parameter.detach().clone() for parameter in own.values()]
    training_call(bound, work)()
    assert not all(torch.equal(old, new) for old, new in zip(before, own.values(), strict=True))


def test_it_has_the_layer_norm_of_its_configurations_where_apex_is_there(installed, work, monkeypatch):
    """Their `enable_layernorm_kernel=True`; without apex upstream cannot follow it."""
    present = {"opensora": "1.1.0"}
    monkeypatch.setattr(provider, "installed_version", lambda name: present.get(name, ""))
    own = model_provider(VARIANT_OF["open-sora"])
    own.prepare(work)
    assert own.version() == f"{torch.__version__} opensora 1.1.0"
    present["apex"] = "0.1"
    own.prepare(work)  # without the extension, as `pip install apex` without its build options leaves it
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", SimpleNamespace())
    own.prepare(work)
    assert [view.enable_layernorm_kernel for view in StandIn.built] == [False, False, True]
    assert own.version() == f"{torch.__version__} opensora 1.1.0 apex 0.1"


def test_it_says_why_it_cannot_run(installed, work, monkeypatch):
    providers = {name: model_provider(VARIANT_OF[name]) for name in ("open-sora", "open-sora-flash")}
    assert providers["open-sora"].missing(work) == "opensora is not installed"
    present = {"opensora": "1.1.0"}
    monkeypatch.setattr(provider, "installed_version", lambda name: present.get(name, ""))
    assert providers["open-sora"].missing(work) == "needs a CUDA GPU"
    on_gpu = SimpleNamespace(device="cuda", is_uniform=True)
    assert providers["open-sora"].missing(on_gpu) == ""
    assert providers["open-sora-flash"].missing(on_gpu) == "flash-attn is not installed"
    assert (
        providers["open-sora"].missing(SimpleNamespace(device="cuda", is_uniform=False)).startswith("takes videos of")
    )
    assert providers["open-sora"].version().endswith("opensora 1.1.0")
