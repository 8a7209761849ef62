"""A server under mixed load for long: its memory must stay flat, and nothing may be left of anybody.

    python tests/soak.py --minutes 20       (make soak)

Each of the faults of test_faults happens once, so that memory has had its peaks. Then clients come in bursts: streams
and whole answers, some left in the middle, chats, vectors, tokens. After each burst one of the faults happens, with its
checks, and then the server rests: what lives in it must be what lived in it in the beginning. The least
memory of their own (USS) that it and its worker held in the second quarter is compared with the last quarter's. Exit
code 1: it grew.
"""

import argparse
import random
import socket
import sys
import threading
import time
from collections import Counter

from served import PATIENCE, STORY, Answered, ServedProcess, reset, soon
from test_faults import CHATS, COMPLETIONS, FAULTS, check, resting, start, undisturbed

BURST_SECONDS, NUM_CLIENTS = 8.0, 12  # more than run at a time, so that some wait
MOST_MIB, MOST_BLOCKS = 4.0, 0.01  # by how much it may grow; blocks are what Python holds, and a share of them
TIDY = """
import ctypes, gc
def tidy():  # what was freed and is kept for the next time is nobody's
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
"""


def ask_around(server: ServedProcess, seed: int, deadline: float, seen: Counter) -> None:
    """A client: one request after the other, of any kind, and not all of them to their end."""
    pick = random.Random(seed)
    while time.monotonic() < deadline:
        body = {"max_tokens": pick.randint(1, 200), "ignore_eos": True, "n": pick.choice([1, 1, 1, 2])}
        body |= {"stream": pick.random() < 0.6, "temperature": pick.choice([0, 0.8]), "seed": pick.randrange(99)}
        prompt = STORY + " there was" * pick.randint(0, 100)
        path, body = pick.choice([
            (COMPLETIONS, body | {"prompt": prompt}),
            (COMPLETIONS, body | {"prompt": [prompt, "The fox"], "logprobs": 2}),
            (CHATS, body | {"messages": [{"role": "user", "content": prompt}]}), ("/tokenize", {"prompt": prompt * 9}),
            ("/v1/embeddings", {"input": [prompt, "a dog"]}), (COMPLETIONS, body | {"prompt": ""}),
        ])  # fmt: skip
        client = server.send("POST", path, body)
        if pick.random() < 0.3:
            if pick.random() < 0.7:
                client.recv(1, socket.MSG_PEEK)
            pick.choice([reset, socket.socket.close])(client)
            seen["left"] += 1
        else:
            answer = Answered(client)
            client.close()
            seen[answer.status] += 1
            if answer.status == 200 and body.get("stream"):
                assert not any("error" in event for event in answer.events)


def burst(server: ServedProcess, seed: int, seen: Counter) -> None:
    """NUM_CLIENTS of them for BURST_SECONDS."""
    deadline, failures = time.monotonic() + BURST_SECONDS, []

    def client(number: int) -> None:
        try:
            ask_around(server, seed * NUM_CLIENTS + number, deadline, seen)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    pick, seen, memory = random.Random(arguments.seed), Counter(), []
    with start("--max-trace-steps=500", changes=TIDY) as server:  # a longer trace is full, and flat, after minutes
        expected = undisturbed(server)
        for row in FAULTS:
            check(server, row, expected)
        at_rest, began, rounds, rows = resting(server), time.monotonic(), 0, []
        while (seconds := time.monotonic() - began) < arguments.minutes * 60:
            burst(server, rounds, seen)
            rows = rows or pick.sample(FAULTS, len(FAULTS))
            row = rows.pop()
            check(server, row, expected)
            soon(lambda: server.alive() == at_rest, within=PATIENCE)
            held = sum(each.memory_full_info().uss for each in (server.process, server.worker))
            memory.append((held / 2**20, server.num_blocks))
            rounds += 1
            held = f"{memory[-1][0]:6.1f} MiB  {memory[-1][1]:,} blocks"
            print(f"{seconds / 60:5.1f} min  {held}  {sum(seen.values()):7,} requests  {row.name}", flush=True)
        quarter = len(memory) // 4
        before, after = (map(min, zip(*memory[i * quarter : (i + 1) * quarter], strict=True)) for i in (1, 3))
        (mib, blocks), (more_mib, more_blocks) = before, after
        assert "Traceback" not in server.log, server.log[server.log.index("Traceback") - 500 :][:3_000]
        assert server.end(15) == 0
    print(f"{dict(seen)}; {len(memory)} faults, nothing left")
    print(f"least held in the second quarter: USS {mib:.1f} MiB, {blocks:,} blocks of Python's")
    print(f"least held in the last quarter:   USS {more_mib:.1f} MiB, {more_blocks:,} blocks")
    return int(more_mib - mib > MOST_MIB or more_blocks > blocks * (1 + MOST_BLOCKS))


if __name__ == "__main__":
    sys.exit(main())
