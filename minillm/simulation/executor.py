"""An executor without a model: says how long a step takes, and invents its tokens."""

from minillm.errors import checked
from minillm.runtime import ModelOutput, SchedulerOutput
from minillm.simulation.clock import VirtualClock
from minillm.simulation.cost_model import CostModel

INVENTED_TOKEN_ID = 0


class SimulatedExecutor:
    """Advances the clock by what the cost model says, and returns a token for every request that samples.

    If a cost model has `host_seconds`, they are part of the seconds of every step: the host launches, and only then the
    device computes. The trace has both.

    The tokens mean nothing, so an output ends only by `max_tokens`: give its length there, with `ignore_eos`.
    """

    @checked
    def __init__(self, cost_model: CostModel, clock: VirtualClock):
        self.cost_model = cost_model
        self.clock = clock

    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """Let the step's time pass; returns its output."""
        work = self.cost_model.work(plan)
        began, host = self.clock(), getattr(self.cost_model, "host_seconds", None)
        if plan.num_requests:
            self.clock.advance(self.cost_model.seconds(work))
        token_ids = dict.fromkeys(plan.decodes, INVENTED_TOKEN_ID)
        token_ids.update((part.request_id, INVENTED_TOKEN_ID) for part in plan.others if part.samples)
        device_times = None if host is None else (min(began + host, self.clock()), self.clock())
        return ModelOutput(token_ids, work.score_entries, device_times=device_times)
