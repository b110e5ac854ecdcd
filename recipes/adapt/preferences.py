"""Which of two answers is preferred, learned without a model of rewards (DPO, arXiv 2305.18290).

The worse answer has the words of the better one, in another order.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from recipes.generate.answers import Pair, encode_pairs
from recipes.generate.model import IGNORED

FEWEST_WORDS = 5


def encode_preferences(tokenizer: Tokenizer, pairs: Iterable[Pair], context: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, [pairs, 2, context] each: of the better answer, and of the worse. Pairs that are too long are left out."""
    both = [
        encode_pairs(tokenizer, [pair, worse_than(pair)], context)
        for pair in pairs
        if len(pair.answer.split()) >= FEWEST_WORDS
    ]
    fitting = [(tokens, targets) for tokens, targets in both if len(tokens) == 2]
    return torch.stack([tokens for tokens, _ in fitting]), torch.stack([targets for _, targets in fitting])


def worse_than(pair: Pair) -> Pair:
    words = pair.answer.split()
    random.Random(pair.answer).shuffle(words)  # always in the same order
    return replace(pair, answer=" ".join(words))


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Of whole answers: [rows, length, vocabulary] and [rows, length] to [rows], in float32."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(targets.shape).sum(1)


def margins(policy: Tensor, reference: Tensor) -> Tensor:
    """How much more than the reference a model prefers the better answer of each pair, as a logarithm.

    Args:
        policy, reference: log probabilities of both answers by the model and by the reference, [pairs, 2].
    """
    gains = policy - reference
    return gains[:, 0] - gains[:, 1]


def preference_loss(margin: Tensor, beta: float) -> Tensor:
    """Equation 7 of the paper.

    Args:
        beta: how dear it is to leave the reference.
    """
    return -F.logsigmoid(beta * margin).mean()
