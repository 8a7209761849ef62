"""Layers 1 and 2: requests, the scheduler that decides who computes what, and what drives them.

May import `runtime`, which carries out the plans, and the rooms below. `request`, `queue`, `block_manager`,
`scheduler` and `routing` import neither torch nor numpy.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "block_manager": "BlockManager Prefix extend_prefixes",
        "engine_config": "EngineConfig",
        "llm": "LLM",
        "llm_engine": "LLMEngine",
        "outputs": "CompletionOutput Logprob OutputKind RequestOutput",
        "prompts": "Prompt check_request encode_prompt",
        "queue": "SCHEDULING_POLICIES WaitingQueue",
        "recorder": "NotedStep",
        "request": "Request output_id",
        "routing": "block_keys PowerOfTwo PrefixAware ROUTERS RoundRobin Router make_router",
        "scheduler": "ADMISSIONS Scheduler SchedulerConfig StepUpdate id_in_use",
    },
)
