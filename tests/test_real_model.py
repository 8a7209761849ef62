"""On a real model and real text we compute and say what transformers does; `make test-real` runs this."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import LLM, SamplingParams, load_model
from minillm.bench import real_model
from minillm.errors import ModelNotFoundError
from tiny_models import TOLERANCE, all_logits, difference

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = (ROOT / "minillm" / "model" / "decoder.py").read_text(encoding="utf-8")
CHINESE = "人工智能的发展非常迅速。语言模型根据前面的文字预测下一个词，一个接一个，直到写完整个句子。你今天过得怎么样？"
EMOJI = "The fox 🦊 and the family 👨‍👩‍👧‍👦 in 🇨🇭, naïvely: café ☕, 5 × 3 ≠ 16, “quoted” and e\u0301.\n\n\t🙂🙃"
LONG = 1500  # tokens
TEXTS = {"English": ENGLISH[:1500], "code": CODE[:1500], "Chinese": CHINESE, "emoji": EMOJI}

SYSTEM = {"role": "system", "content": "You are a patient teacher. Answer in a few short sentences, with one example."}
QUESTIONS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "用中文介绍一下你自己。",
    "Say something nice with emoji 🦊🎉!",
    "What is 17 + 25? Explain how you add them.",
]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
TAUGHT = [[SYSTEM, *chat] for chat in CHATS]  # they share their first tokens
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


@pytest.fixture(scope="module")
def folder():
    try:
        return real_model.checkpoint()
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture
def make_llm(folder):
    """Engines of this model, ended with the test."""
    made = []

    def make(**arguments) -> LLM:
        arguments = {"max_model_len": 512, "num_blocks": 200, "max_num_seqs": 8} | arguments
        made.append(LLM(folder, verbose=False, **arguments))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


@pytest.fixture(scope="module")
def expected(reference, loaded):
    """conversations -> transformers' own greedy answers, the end included."""
    known = {}

    def answers(chats) -> list[list[int]]:
        for chat in chats:
            if str(chat) not in known:
                ids = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                said = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
                known[str(chat)] = said[0, len(ids) :].tolist()
        return [known[str(chat)] for chat in chats]

    return answers


def answered(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


# --- logits ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare_logits(token_ids, reference, model):
    theirs = reference(torch.tensor([token_ids])).logits[0]
    assert difference(all_logits(model, token_ids), theirs) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", TEXTS)
def test_logits_of_real_text_are_those_of_transformers(kind, reference, loaded):
    compare_logits(loaded.tokenizer.encode(TEXTS[kind]), reference, loaded.model)


def test_logits_of_1500_tokens_are_those_of_transformers(reference, loaded):
    token_ids = loaded.tokenizer.encode(ENGLISH + CODE)[:LONG]
    assert len(token_ids) == LONG
    compare_logits(token_ids, reference, loaded.model)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_alone_are_those_of_transformers(make_llm, expected):
    llm = make_llm(enable_prefix_caching=False)
    for chat, answer in zip(CHATS, expected(CHATS), strict=True):
        assert answered(llm.chat(chat, GREEDY, use_tqdm=False)) == [answer]


def test_answers_in_a_batch_are_the_same(make_llm, expected):
    llm = make_llm()
    assert answered(llm.chat(CHATS, GREEDY, use_tqdm=False)) == expected(CHATS)
    assert max(len(step.scheduled) for step in llm.trace.steps) == len(CHATS)


def test_answers_to_prompts_in_chunks_are_the_same(make_llm, expected):
    llm = make_llm(max_num_batched_tokens=12)
    assert answered(llm.chat(CHATS, GREEDY, use_tqdm=False)) == expected(CHATS)
    assert sum(part.why == "prefill" for step in llm.trace.steps for part in step.scheduled) > 2 * len(CHATS)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_answers_of_preempted_requests_are_the_same(mode, make_llm, expected):
    llm = make_llm(num_blocks=20, max_model_len=160, enable_prefix_caching=False, preemption_mode=mode)
    assert answered(llm.chat(CHATS, GREEDY, use_tqdm=False)) == expected(CHATS)
    assert sum(len(step.preempted) for step in llm.trace.steps) > 0


def test_answers_behind_a_shared_system_prompt_are_the_same(make_llm, expected):
    llm = make_llm()
    assert answered(llm.chat(TAUGHT, GREEDY, use_tqdm=False)) == expected(TAUGHT)
    again = llm.chat(TAUGHT, GREEDY, use_tqdm=False)
    assert answered(again) == expected(TAUGHT)
    assert all(output.num_cached_tokens > 0 for output in again)


# --- text and log-probabilities --------------------------------------------------------------------------------------


def test_what_is_streamed_is_the_whole_text(make_llm, loaded, expected):
    llm = make_llm()
    for chat, answer in zip(CHATS, expected(CHATS), strict=True):
        (whole,) = llm.chat(chat, GREEDY, use_tqdm=False)
        pieces = [output.outputs[0].text for output in llm.stream(list(whole.prompt_token_ids), GREEDY)]
        assert "".join(pieces) == whole.outputs[0].text == loaded.tokenizer.decode(answer, skip_special_tokens=True)
        assert len(pieces) > 5


def test_log_probabilities_are_those_of_transformers(make_llm, reference, expected):
    llm = make_llm()
    (output,) = llm.chat(CHATS[0], SamplingParams(temperature=0.0, max_tokens=64, logprobs=5), use_tqdm=False)
    prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    theirs = logits.log_softmax(-1)  # [answer, V]
    for place, told in enumerate(output.outputs[0].logprobs):
        best = theirs[place].topk(5)
        assert list(told)[:5] == best.indices.tolist()
        for token_id, each in told.items():
            assert abs(each.logprob - theirs[place, token_id].item()) < 1e-3
    assert len(output.outputs[0].logprobs) == len(answer)
