"""Text from a trained model, token by token."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import nn

from recipes.generate.model import GPT
from recipes.text import END_ID

LIKELIEST = 20  # tokens among which one is drawn


@torch.no_grad()
def write(model: nn.Module, tokenizer: Tokenizer, prompt: str, count: int, *, temperature: float = 0.0) -> str:
    """What follows a prompt, until an END or so many tokens.

    Args:
        model: a GPT, not what DDP or zeroopt put around it: it may then be called on one rank alone.
        temperature: 0: always the likeliest token; else one of the `LIKELIEST`, drawn.
    """
    assert isinstance(model, GPT)
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    begin = tokens.shape[1]
    for _ in range(count):
        logits = model(tokens[:, -model.context :])[0, -1].float()
        values, candidates = logits.topk(LIKELIEST)
        place = 0
        if temperature:
            place = int(torch.multinomial((values / temperature).softmax(0), 1, generator=generator))
        if int(candidates[place]) == END_ID:
            break
        tokens = torch.cat([tokens, candidates[place].view(1, 1)], dim=1)
    written: str = tokenizer.decode(tokens[0, begin:].tolist())
    return written
