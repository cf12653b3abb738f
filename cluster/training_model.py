"""The model made ready for a training phase, the precision it computes in, and what is exported of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cluster.artifacts import ArtifactRef
from cluster.config import TrainPhase
from cluster.engine import Precision
from cluster.models import load_model_ref
from cluster.registry import Registry
from cluster.training_figures import WorkerGroup
from colbert_core.attention import CPU_ATTENTION
from colbert_core.encoder import ColBERT
from colbert_core.errors import ConfigError
from colbert_core.precision import bf16_is_fast


def prepare_model(model: ColBERT, phase: TrainPhase) -> ColBERT:
    """Applies ``freeze`` and ``dropout`` of a phase and the device's attention, in place; training mode.

    Raises:
        ConfigError: a ``freeze`` pattern matches no parameter.
    """
    for pattern in phase.freeze:
        matched = [parameter for name, parameter in model.named_parameters() if pattern in name]
        if not matched:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:4])
            raise ConfigError(f"freeze: no parameter's name contains {pattern!r}; there are {some}, …")
        for parameter in matched:
            parameter.requires_grad_(False)
    if phase.dropout is not None:
        for module in model.modules():
            name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, phase.dropout)
    if not phase.gpus_per_worker:
        # On a CPU the backward pass of torch's fused attention takes twice as long as the plain one.
        model.backbone.set_attn_implementation(CPU_ATTENTION)
    return model.train()


def exported_model(registry: Registry, start: ArtifactRef, weights: Mapping[str, torch.Tensor]) -> ColBERT:
    """A model as it is published: a fresh copy of the phase's start, with the weights that were trained.

    Parameters that were frozen, and perhaps rounded to bf16 in the live model, are as they were.

    Args:
        registry: where the start is.
        start: what the phase started from.
        weights: x in fp32, by name.
    """
    model = load_model_ref(registry, start)
    load_weights(model, weights)
    return model


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies weights into a model by parameter name; parameters not named stay as they are."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def agreed_precision(phase: TrainPhase, group: WorkerGroup) -> Precision:
    """What a phase's ``precision`` means on these workers; collective.

    'auto' is 'autocast' if bf16 products are fast on all of them, so that a group of unlike machines
    computes alike, and 'fp32' otherwise.
    """
    if phase.precision != "auto":
        return phase.precision
    device = torch.device("cuda" if phase.gpus_per_worker else "cpu")
    (slow,) = group.largest([float(not bf16_is_fast(device))])
    return "fp32" if slow else "autocast"
