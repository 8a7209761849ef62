"""How the next token is chosen: parameters, filters, random numbers, log-probabilities.

Imports nothing but `errors`. `params` needs no torch: the scheduler reads it too.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "params": "GREEDY_BELOW MOST_LOGPROBS PromptLogprobs SamplingParams TokenLogprobs finish_reason limited",
        "processors": "LogitsProcessor",
        "filters": "filtered next_token_probabilities",
        "sampler": "NOISE_STRIDE PHILOX_ROUNDS SamplingState gumbel_noise philox sample sample_rows",
        "logprobs": "PROMPT_ROWS prompt_logprobs token_logprobs",
        "tensors": "to_device",
    },
)
