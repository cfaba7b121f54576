"""``compile: true`` fuses norms, activations and rotations, and changes nothing else."""

from __future__ import annotations

import torch

from megacore.growth.verify import random_batch
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared, initialise
from tests.models import model_config, plain_loss
from tests.training.test_layout_matrix import LLAMA


def test_a_compiled_model_has_the_same_loss_and_gradients() -> None:
    config = model_config(**LLAMA)
    losses, gradients = [], []
    for compiled in (False, True):
        model = Transformer(Kit(config, Declare(config), ParallelGrid(), seed=1, compile=compiled))
        initialise(model, config, seed=1)
        batch = random_batch(config, samples=4)
        loss = plain_loss(model.train()(batch), batch)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: parameter.grad for name, parameter in declared(model)})
    assert abs(losses[0] - losses[1]) <= 1e-5
    for name, expected in gradients[0].items():
        assert expected is not None and torch.allclose(gradients[1][name], expected, rtol=1e-4, atol=1e-5), name
