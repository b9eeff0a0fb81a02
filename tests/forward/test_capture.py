"""What a device asks of its callers: launches go to it, and no graph is captured around what needs the host."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moe_offload import OffloadError
from moe_offload.apps.families.tiny import build
from moe_offload.experts import find_experts
from moe_offload.memory.transfer import TRANSFERS
from moe_offload.memory.transfer.staged import DeviceTransfer
from moe_offload.memory.transfer.streams import CudaStreams
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, resident, say
from tests.fakes.streams import HostStreams

STEP = torch.tensor([[5]])


@pytest.fixture
def streams(monkeypatch):
    torch._dynamo.reset()
    made = HostStreams(0.0)
    monkeypatch.setitem(TRANSFERS, "cpu", lambda device: DeviceTransfer(made, staging_rows=2))
    return made


def decided(on_disk=(), layers=2):
    model = build(QWEN, num_hidden_layers=layers)
    names = [moe.name for moe in find_experts(model)]
    where = {"": "cpu", **{names[i]: "disk" for i in on_disk}}
    return offload(model, 0.5, config=replace(SETTINGS, decide="device"), device_map=where)


def after_the_prompt(model):
    with torch.no_grad():
        return model(IDS, use_cache=True).past_key_values


def test_a_capture_around_a_layer_of_the_host_is_refused_by_name(streams):
    model = decided(on_disk=(1,))
    past = after_the_prompt(model)
    model(STEP, past_key_values=past)
    streams.captures = True
    with pytest.raises(OffloadError, match=r"layers\.1\.mlp\.experts: a CUDA graph is being captured.*decide"):
        model(STEP, past_key_values=past)
    streams.captures = False
    assert torch.equal(say(model), say(resident(layers=2))), "nothing is left of it"
    model.moe_offload.close()


def test_a_capture_around_a_prompt_or_a_first_step_is_refused(streams):
    model = decided()
    streams.captures = True
    with pytest.raises(OffloadError, match=r"layers\.0.*it is a prompt"):
        model(IDS)
    streams.captures = False
    past = after_the_prompt(model)
    streams.captures = True
    with pytest.raises(OffloadError, match=r"layers\.0.*the first decode step of its size"):
        model(STEP, past_key_values=past)
    streams.captures = False
    assert torch.equal(say(model), say(resident(layers=2)))
    model.moe_offload.close()


def test_a_capture_around_a_model_that_never_ran_is_refused_before_anything_is_compiled(streams, monkeypatch):
    """The compiler saves the state of the GPU's random numbers, which fails within a capture, in torch's own words."""
    model = decided()
    monkeypatch.setattr(model._compiled_call_impl, "run", lambda *_: pytest.fail("it went on to compile"))
    streams.captures = True
    with pytest.raises(OffloadError, match=r"layers\.0.*captured"):
        model(STEP)
    streams.captures = False
    model.moe_offload.close()


@pytest.mark.parametrize("message", ["Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture", "else"])
def test_an_error_of_torch_that_a_capture_is_the_reason_of_is_ours(streams, monkeypatch, message):
    """A prompt, within a capture, on a model that has decoded: it is compiled, and torch raises before ours can."""
    model = decided()
    past = after_the_prompt(model)
    model(STEP, past_key_values=past)

    def compile(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(model._compiled_call_impl, "run", compile)
    streams.captures = True
    with pytest.raises(RuntimeError, match=r"layers\.0.*captured" if "capture" in message else "^else$") as raised:
        model(IDS)
    assert isinstance(raised.value, OffloadError) == ("capture" in message)
    streams.captures = False
    monkeypatch.undo()
    model.moe_offload.close()


def test_a_capture_around_what_the_passes_did_not_see_is_refused(streams):
    model = decided()
    streams.captures = True
    with pytest.raises(OffloadError, match=r"layers\.0.*captured"):
        model.model(IDS)
    model.moe_offload._runtime.hand_back()  # the host is in charge: nothing to wait for
    streams.captures = False
    model.moe_offload.close()


def test_a_step_that_the_device_decides_may_be_captured(streams):
    model = decided()
    past = after_the_prompt(model)
    model(STEP, past_key_values=past)
    streams.captures = True
    model(STEP, past_key_values=past)
    with pytest.raises(OffloadError, match=r"layers\.0.*first decode step of its size"):
        model.moe_offload._runtime.device_caches.take_over({3})
    with pytest.raises(OffloadError, match=r"layers\.0.*captured"):
        model.moe_offload._runtime.hand_back()
    streams.captures = False
    assert model.moe_offload.stats().by_device == 4
    model.moe_offload.close()


def test_kernels_and_copies_are_launched_while_the_device_is_current(streams, monkeypatch):
    seen = []

    def watched(launch):
        return lambda *args: seen.append(streams.is_current) or launch(*args)

    model = decided(on_disk=(1,))
    cache = model.moe_offload._runtime.device_caches.caches[0]
    cache.kernels = cache.kernels._replace(decide=watched(cache.kernels.decide), gather=watched(cache.kernels.gather))
    for verb in ("fetch", "stream"):
        for layer in model.moe_offload._runtime.layers:
            monkeypatch.setattr(layer, verb, watched(getattr(layer, verb)))
    monkeypatch.setattr(streams, "mark", watched(streams.mark))
    say(model, n=3)
    with torch.no_grad():
        model.model(IDS)
    monkeypatch.setattr(streams, "drain", watched(streams.drain))
    forwards = len(seen)
    model.moe_offload.close()
    assert forwards > 10 and len(seen) == forwards + 1 and all(seen)
    assert not streams.is_current


def test_the_streams_of_a_gpu_make_it_current(monkeypatch):
    entered = []
    monkeypatch.setattr("torch.cuda.Stream", lambda device, priority=0: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr("torch.cuda.device", lambda device: entered.append(str(device)) or torch.no_grad())
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("torch.cuda.cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0))
    streams = CudaStreams(torch.device("cuda:1"))
    with streams.current():
        assert entered == ["cuda:1"]
    streams.pin(torch.zeros(4096, dtype=torch.uint8))
    assert entered == ["cuda:1"] * 2 and streams.capturing()
