"""One vector for a whole text: the mean of its final hidden states."""

import torch
from torch import Tensor

from minillm.attention import rectangular, sdpa_attention
from minillm.model import Decoder


@torch.inference_mode()
def mean_hidden_state(model: Decoder, token_ids: list[int], chunk_size: int) -> Tensor:
    """[T] token ids -> [hidden], the mean over all T of what the model's final norm gives; float32 at least.

    At most `chunk_size` tokens go through the model at once. They attend to those before them through a cache of their
    own, as long as the text.
    """
    config, stored = model.config, {}  # of each layer, the keys and values of all tokens so far

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = stored.get(layer, (k[:0], v[:0]))
        keys, values = stored[layer] = [torch.cat(pair) for pair in zip(before, (k, v), strict=True)]  # [T, Hkv, D]
        mask = rectangular(len(q), len(keys), window=config.sliding_window(layer), device=q.device)
        return sdpa_attention(q, keys, values, mask)

    total = torch.zeros(config.hidden_size, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
    ids = torch.tensor(token_ids, dtype=torch.long, device=model.device)
    positions = torch.arange(len(ids), device=model.device)
    for chunk, places in zip(ids.split(chunk_size), positions.split(chunk_size), strict=True):
        total += model(chunk, places, attend).to(total.dtype).sum(0)  # [chunk, hidden] -> [hidden]
    return total / len(token_ids)
