"""The networks of the libraries have every member that our annotation classes declare."""

from __future__ import annotations

import copy
from typing import get_type_hints

import pytest
from torch import nn

from diffalign.models.adapters.lora import add_lora
from diffalign.models.loading.modules import VAE, TextModel, UNet
from tests.models.conftest import Model


def missing(network: nn.Module | None, kind: type[nn.Module]) -> list[str]:
    own = set(get_type_hints(kind)) - set(get_type_hints(nn.Module))
    assert own
    return [name for name in sorted(own) if not hasattr(network, name)]


def test_the_networks_have_the_annotated_members(model: Model) -> None:
    unet = copy.deepcopy(model.base.unet)
    add_lora(unet, 2)
    assert not missing(unet, UNet)
    assert not missing(model.base.vae, VAE)
    assert model.base.text is not None
    assert not any(missing(text, TextModel) for text in model.base.text.models)


@pytest.mark.parametrize("kind", [UNet, VAE, TextModel])
def test_a_network_without_them_is_noticed(kind: type[nn.Module]) -> None:
    assert "config" in missing(nn.Linear(1, 1), kind)
