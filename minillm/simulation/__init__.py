"""Schedulers without a model: a virtual clock, cost models, synthetic workloads, reports.

May import `ladder`, `engine` and the rooms below; nothing that runs a model imports it.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "clock": "RealClock VirtualClock",
        "cost_model": "Calibrated CostModel KERNELS_A_LAYER LAUNCH_SECONDS Roofline StepWork WithHost preset",
        "executor": "SimulatedExecutor",
        "explaining": "EXPLAINED ExplainError Explanation TimeUse explain",
        "factors": "Decomposition Factor",
        "published": (
            "Assumptions CAUSES CLAIMED PAGED_ATTENTION Published SETTINGS Setting observations sensitivity under_load "
            "verdict"
        ),
        "replicas": "Replica ReplicasReport run_replicas",
        "reporting": "Report ReportBuilder SLO report Spread spread",
        "running": "BATCHING compare_batching fresh run",
        "workload": (
            "COURSE_SEED ChatLengths course_requests fixed load_requests lognormal made_request make_requests poisson "
            "prefixed_requests stream_requests uniform"
        ),
    },
)
