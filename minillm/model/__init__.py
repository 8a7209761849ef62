"""The decoder, token-wise and without a batch dimension; its configuration, weights and tokenizer.

May import `sampling`, and `storyteller`, the model that is shipped. `config` imports no torch.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "config": "ModelConfig RopeConfig",
        "decoder": "Decoder Heads Operations add_rms_norm rope_rotation rotate silu_mul",
        "hf_config": "load_tokenizer read_config",
        "shards": "Shard WHOLE",
        "text": "Detokenizer TokenDecoder Tokenizer encode encode_chat token_texts",
        "weights": "load_decoder load_model locate",
    },
)
