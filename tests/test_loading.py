"""Loading models: folders, single files, LinFusion modules beside them or not."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

import engine
from engine.config import UserError
from engine.linfusion import LinearAttention, self_attentions
from engine.loading import _single_file_class


def is_linear(pipe):
    return {isinstance(attention, LinearAttention) for _, attention in self_attentions(pipe.unet)}


def test_modules_beside_a_model_are_mounted(tiny_model):
    assert is_linear(engine.load(str(tiny_model))) == {True}


def test_a_model_can_stay_quadratic_and_be_linearised_later(tiny_model):
    pipe = engine.load(str(tiny_model), linfusion="none", dtype=torch.float64)
    assert is_linear(pipe) == {False}
    engine.linearize(pipe, tiny_model / "linfusion")
    assert is_linear(pipe) == {True}
    assert pipe.unet.dtype == torch.float64


def test_without_modules_anywhere_the_sentence_says_what_would_work(tiny_model):
    pipe = engine.load(str(tiny_model), linfusion="none")
    pipe.register_to_config(_name_or_path="elsewhere")
    with pytest.raises(UserError, match="no published LinFusion modules fit a UNet with 24 wide"):
        engine.linearize(pipe)


def test_the_family_of_a_single_file_is_read_off_its_header(tmp_path):
    sd, xl = tmp_path / "sd.safetensors", tmp_path / "xl.safetensors"
    save_file({"cond_stage_model.transformer.weight": torch.zeros(1)}, sd)
    save_file({"conditioner.embedders.1.model.ln_final.bias": torch.zeros(1)}, xl)
    assert _single_file_class(sd) is StableDiffusionPipeline
    assert _single_file_class(xl) is StableDiffusionXLPipeline


@pytest.mark.parametrize("name", ["nowhere.safetensors", "broken.safetensors", "no/such-model"])
def test_what_cannot_be_read_is_named_in_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_text("this is no safetensors file")
    with pytest.raises(UserError, match=f"model '{name}' is not readable: give 'demo'") as caught:
        engine.load(name)
    assert "\n" not in str(caught.value)


def test_unknown_names_of_the_package_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        _ = engine.paint
