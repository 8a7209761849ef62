"""One vector for a whole text: the mean of its final hidden states."""

import torch
from torch import Tensor

from minillm.attention import CachedAttention
from minillm.generation import as_tensor, positions
from minillm.kv_cache import KVCache
from minillm.model import Decoder


@torch.inference_mode()
def mean_hidden_state(model: Decoder, token_ids: list[int], chunk_size: int) -> Tensor:
    """[T] token ids -> [hidden], the mean over all T of what the model's final norm gives; float32 at least.

    At most `chunk_size` tokens go through the model at once, under a cache of their own.
    """
    cache = KVCache(model.config, len(token_ids), model.dtype, model.device)
    total = torch.zeros(model.config.hidden_size, dtype=torch.promote_types(model.dtype, torch.float32))
    total = total.to(model.device)
    while cache.length < len(token_ids):
        start, end = cache.length, min(cache.length + chunk_size, len(token_ids))
        attend = CachedAttention(model.config, cache)
        hidden = model(as_tensor(token_ids[start:end], model), positions(start, end, model), attend)  # [T, hidden]
        cache.advance(end - start)
        total += hidden.to(total.dtype).sum(0)
    return total / len(token_ids)
