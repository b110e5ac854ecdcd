"""Models of transformers, made from their configurations with random weights. Importing this imports their classes, which takes
memory that is none of a model's."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

logging.getLogger("transformers").setLevel(
    logging.ERROR
)  # that ids of special tokens lie outside of a small vocabulary, say


def gpt2(**sizes: Any) -> nn.Module:
    """Its head is its embedding, whose gradient is complete only at the end of backward."""
    return GPT2LMHeadModel(GPT2Config(**sizes))


def bert(**sizes: Any) -> nn.Module:
    return BertForMaskedLM(BertConfig(**sizes))


def t5(**sizes: Any) -> nn.Module:
    """Encoder and decoder share their embedding."""
    return T5ForConditionalGeneration(T5Config(**{**sizes, "decoder_start_token_id": 0}))


def vit(**sizes: Any) -> nn.Module:
    return ViTForImageClassification(ViTConfig(**sizes))


def resnet(**sizes: Any) -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(**sizes))


def mixture(**sizes: Any) -> nn.Module:
    """Of experts, whose matrices are parts of one parameter a layer."""
    return MixtralForCausalLM(MixtralConfig(**sizes))
