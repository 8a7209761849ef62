"""How the next token is chosen: parameters, filters, random numbers, log-probabilities.

Imports nothing but `errors`. `params` needs no torch: the scheduler reads it too.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "params": [
            "GREEDY_BELOW",
            "MOST_LOGPROBS",
            "PromptLogprobs",
            "SamplingParams",
            "TokenLogprobs",
            "finish_reason",
            "limited",
        ],
        "sampler": [
            "LogitsProcessor",
            "PROMPT_ROWS",
            "make_generator",
            "make_processor",
            "next_token_probabilities",
            "processed",
            "prompt_logprobs",
            "sample",
            "take",
            "to_device",
            "token_logprobs",
        ],
    },
)
