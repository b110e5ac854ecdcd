"""Tiny random models of common architectures, built from the configurations of `transformers`. Nothing is downloaded.

A worker imports transformers with the first model that it builds, not with this module: that takes seconds.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]

VOCABULARY = 97
CLASSES = 5
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# In a vocabulary this small, the defaults would lie outside of it.
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """How to make a model, and what it is fed.

    Attributes:
        make: the model with random weights.
        inputs: keyword arguments of its forward, which then returns an object with a `loss`.
        leaves_some_unused: not every parameter has a gradient in every step, nor on every rank.
        prepare_for_bfloat16: what the model needs for a forward with parameters in bfloat16, besides those.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]
    leaves_some_unused: bool = False
    prepare_for_bfloat16: Callable[[nn.Module], None] | None = None

    def build(self) -> nn.Module:
        """The model in float32, with the same weights wherever it is built.

        All of them are moved a little from where training starts, zero biases above all: some gradients, such as those of
        the biases of attention's keys, are zero but for rounding, and a parameter that only they moved would be rounding too.
        """
        torch.manual_seed(1234)
        model = self.make()
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param), alpha=0.02)
        return model

    def batch(self, rank: int, step: int) -> Inputs:
        """A rank's inputs for a step."""
        return self.inputs(torch.Generator().manual_seed(1000 * step + rank))


@cache
def _transformers() -> ModuleType:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from transformers import BertForMaskedLM  # noqa: F401  brings what all models need

    gc.freeze()  # leaves its many objects out of every later collection
    return transformers


def _tokens(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def _text(generator: torch.Generator) -> Inputs:
    return {"input_ids": _tokens(generator, 3, 12), "labels": _tokens(generator, 3, 12)}


def _few_tokens(generator: torch.Generator) -> Inputs:
    """Too few for every expert to get one."""
    return {"input_ids": _tokens(generator, 1, 3), "labels": _tokens(generator, 1, 3)}


def _images(generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, CLASSES, (3,), generator=generator),
    }


def _captions(generator: torch.Generator) -> Inputs:
    ids = _tokens(generator, 3, 12)
    ids[:, -1] = TOKENS["eos_token_id"]
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
        "return_loss": torch.tensor(True),
    }


def _bert() -> nn.Module:
    """An encoder; its head is tied to the embeddings."""
    tf = _transformers()
    config = tf.BertConfig(**TOKENS, **WIDTH, **NO_DROPOUT, max_position_embeddings=24)
    return tf.BertForMaskedLM(config)


def _gpt2() -> nn.Module:
    """A decoder with transposed linear layers."""
    tf = _transformers()
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**TOKENS, **dropout, n_positions=24, n_embd=32, n_layer=2, n_head=2))


def _t5_options() -> dict[str, Any]:
    return {
        **{key: TOKENS[key] for key in ("vocab_size", "eos_token_id", "pad_token_id")},
        "decoder_start_token_id": 0,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "relative_attention_num_buckets": 8,
    }


def _t5() -> nn.Module:
    """An encoder and a decoder that share embeddings."""
    tf = _transformers()
    return tf.T5ForConditionalGeneration(tf.T5Config(**_t5_options(), tie_word_embeddings=True))


def _switch() -> nn.Module:
    """A mixture of experts, each of which has parameters of its own."""
    tf = _transformers()
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}
    config = tf.SwitchTransformersConfig(**_t5_options(), **sparse, num_decoder_layers=2, router_jitter_noise=0.0)
    return tf.SwitchTransformersForConditionalGeneration(config)


def _mixtral() -> nn.Module:
    """A mixture of experts, with rotary embeddings and grouped queries."""
    tf = _transformers()
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "output_router_logits": True}
    config = tf.MixtralConfig(**TOKENS, **WIDTH, **experts, num_key_value_heads=1, max_position_embeddings=24)
    return tf.MixtralForCausalLM(config)


def _vit() -> nn.Module:
    """A transformer over patches of an image."""
    tf = _transformers()
    config = tf.ViTConfig(**WIDTH, **NO_DROPOUT, image_size=16, patch_size=4, num_labels=CLASSES)
    return tf.ViTForImageClassification(config)


def _resnet() -> nn.Module:
    """Convolutions and batch norm."""
    tf = _transformers()
    config = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], layer_type="basic", num_labels=CLASSES
    )
    return tf.ResNetForImageClassification(config)


def _clip() -> nn.Module:
    """Two towers, a contrastive loss, and a 0-dim parameter."""
    tf = _transformers()
    config = tf.CLIPConfig(
        text_config={**TOKENS, **WIDTH, "max_position_embeddings": 12, "projection_dim": 16},
        vision_config={**WIDTH, "image_size": 16, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    return tf.CLIPModel(config)


def _route_in_bfloat16(model: nn.Module) -> None:
    """The routers of Switch Transformers would move their parameters back to float32."""
    for module in model.modules():
        if hasattr(module, "expert_capacity") and hasattr(module, "dtype"):
            module.dtype = torch.bfloat16


def _keep_statistics_in_bfloat16(model: nn.Module) -> None:
    """Batch norm on the CPU wants its statistics in the dtype of its parameters."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.bfloat16())


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(_bert, _text),
    "gpt2": Architecture(_gpt2, _text),
    "t5": Architecture(_t5, _text),
    "switch": Architecture(_switch, _few_tokens, leaves_some_unused=True, prepare_for_bfloat16=_route_in_bfloat16),
    "mixtral": Architecture(_mixtral, _few_tokens),
    "vit": Architecture(_vit, _images),
    "resnet": Architecture(_resnet, _images, prepare_for_bfloat16=_keep_statistics_in_bfloat16),
    "clip": Architecture(_clip, _captions),
}
