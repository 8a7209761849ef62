"""What happened in a run, as plain data: events, and files of them. Everything drawn comes from here.

May import nothing but `errors`; no torch.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "chrome": "save_chrome_trace",
        "events": "BlockUse Preemption RequestRecord ScheduledTokens StepEvent Trace Uses Why",
        "journey": "Stage UnknownRequestError find_request journey_lines stages_of",
        "files": "TraceFileError load_trace record_of records_of save_trace trace_lines",
    },
)
