"""Train the storyteller: tokenizer and model from the generated corpus, saved as a normal transformers checkpoint.

    python -m minillm.storyteller.train --out my-storyteller

One document is one row (rows are never joined: without a document mask the model learns to mix stories up), rows of
similar length share a padded batch, and one step adds up the gradients of all batches of its documents. The number of
steps is fixed, so a seed fixes the run up to rounding.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from minillm.errors import MOST, check_device, check_options, check_whole
from minillm.storyteller import corpus, forward

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] in ['user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] != 'system' %}"
    "{{ raise_exception('the storyteller knows the roles user and assistant (system is ignored), not ' "
    "+ message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NOT_TRAINED = -100  # label of a position without a loss
CONTEXT = 2048  # positions the model accepts; RoPE, though no document is longer than about 450 tokens


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the training makes."""

    steps: int = 5_000  # optimiser steps
    documents: int = 72  # documents a step
    seed: int = 0  # of the corpus and of the initial weights
    matrix_lr: float = 8e-3  # peak, Muon: the two-dimensional weights
    vector_lr: float = 3e-3  # peak, AdamW: embedding and norms
    warmup: int = 100  # steps
    finish_steps: int = 450  # steps on the finishing mix, after the others
    finish_peak: float = 0.3  # of the two learning rates, in the finishing steps
    vocabulary: int = 2048  # BPE entries asked for; merges may run out earlier
    tokenizer_documents: int = 30_000  # documents the BPE is fitted to
    hidden: int = 128
    feed_forward: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = check_device("--device", args.device)
    check_options(args, at_least_one=("steps", "documents", "log_every", "save_every"))
    check_whole("--threads", args.threads, 1, 1024)
    check_whole("--finish-steps", args.finish_steps, 0, 10**6)
    check_whole("--seed", args.seed, -MOST, MOST)
    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, finish_steps=args.finish_steps, documents=args.documents, seed=args.seed)
    train(recipe, Path(args.out), device, args.log_every, args.save_every, args.compile)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm storyteller train", description=__doc__.split("\n\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", default="my-storyteller", help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps")
    parser.add_argument("--finish-steps", type=int, default=Recipe.finish_steps, help="steps on the finishing mix")
    parser.add_argument("--documents", type=int, default=Recipe.documents, help="documents a step")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is fastest for matrices this small")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="no torch.compile: needs no C++ compiler, half as fast",
    )
    parser.add_argument("--log-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=1000, metavar="STEPS")
    return parser.parse_args(argv)


def train(recipe: Recipe, out: Path, device: str, log_every: int, save_every: int, compiled: bool = True) -> None:
    """Run the recipe: the general mix, then the finishing one at a lower learning rate."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "training.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer).to(device)
    loss = Loss(model, device, compiled)
    for phase in phases(recipe):
        train_phase(phase, recipe, model, tokenizer, loss, out, log_every, save_every)


class Phase(NamedTuple):
    """A run of steps on one mix, with its own optimisers and its own decay."""

    mix: corpus.Mix
    first_document: int  # of the corpus; phases share no document
    steps: int
    peak: float  # of the recipe's learning rates


def phases(recipe: Recipe) -> list[Phase]:
    finish = Phase(corpus.FINISH, recipe.steps * recipe.documents, recipe.finish_steps, recipe.finish_peak)
    return [Phase(corpus.GENERAL, 0, recipe.steps, 1.0), *([finish] if recipe.finish_steps else [])]


def training_documents(recipe: Recipe) -> Iterator[corpus.Document]:
    """Every document the recipe trains on, in order."""
    for phase in phases(recipe):
        for i in range(phase.steps * recipe.documents):
            yield corpus.document(recipe.seed, phase.first_document + i, mix=phase.mix)


def train_phase(phase, recipe, model, tokenizer, loss, out: Path, log_every: int, save_every: int) -> None:
    """Saves the checkpoint every `save_every` steps and appends a line to training.log every `log_every`."""
    optimisers = build_optimisers(model, recipe)
    held_out = [encode(tokenizer, corpus.document(recipe.seed, i, held_out=True)) for i in range(200)]
    started, tokens, recent = time.perf_counter(), 0, []
    for step in range(1, phase.steps + 1):
        indices = range(recipe.documents * (step - 1), recipe.documents * step)
        documents = [corpus.document(recipe.seed, phase.first_document + i, mix=phase.mix) for i in indices]
        rows = [encode(tokenizer, document) for document in documents]
        set_learning_rates(optimisers, phase, recipe.warmup, step)
        recent.append(train_step(model, loss, optimisers, rows))
        tokens += sum(len(ids) for ids, _ in rows)
        if step % log_every == 0 or step == phase.steps:
            seconds = round(time.perf_counter() - started)
            line = {"step": step, "loss": sum(recent) / len(recent), "tokens": tokens, "seconds": seconds}
            recent = []
            if step % save_every == 0 or step == phase.steps:
                line["held_out_loss"] = loss.mean(held_out)
                save_checkpoint(model, tokenizer, out)
            log(out, line)


# --- tokenizer ------------------------------------------------------------------------------------


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one, no token at the beginning; the special tokens have the ids 0 to 4.

    It is fitted to the documents of `corpus.VOCABULARY`, not to those of the training: so the ids stay what they are.
    """
    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(corpus.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = (corpus.document(recipe.seed, i, mix=corpus.VOCABULARY) for i in range(recipe.tokenizer_documents))
    tokenizer.train_from_iterator((text for document in documents for text, _ in document.segments), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=corpus.END_OF_TEXT,
        pad_token=corpus.PAD,
        additional_special_tokens=[corpus.USER, corpus.ASSISTANT, corpus.END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def encode(tokenizer, document: corpus.Document) -> tuple[list[int], list[int]]:
    """Token ids of a document, and its labels: the same ids, or NOT_TRAINED where the user speaks."""
    ids, labels = [], []
    for text, is_trained in document.segments:
        piece = tokenizer.backend_tokenizer.encode(text).ids
        ids += piece
        labels += piece if is_trained else [NOT_TRAINED] * len(piece)
    return ids, labels


# --- model and optimisers -------------------------------------------------------------------------


def build_model(recipe: Recipe, tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3-shaped decoder; its vocabulary is exactly the tokenizer's, so no padding entry can ever be sampled."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (corpus.END_OF_TEXT, corpus.END)]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, max_new_tokens=512
    )
    return model


def build_optimisers(model: torch.nn.Module, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """(optimiser, peak learning rate): Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    vectors = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, momentum=0.95, weight_decay=0.1)
    adamw = torch.optim.AdamW(vectors, lr=recipe.vector_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, recipe.matrix_lr), (adamw, recipe.vector_lr)]


def set_learning_rates(optimisers: list, phase: Phase, warmup: int, step: int) -> None:
    """Linear warm-up, then half a cosine down to 1 % of the peak of this phase."""
    progress = max(0.0, (step - warmup) / max(1, phase.steps - warmup))
    factor = phase.peak * min(1.0, step / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
    for optimiser, peak in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = peak * factor


# --- one step -------------------------------------------------------------------------------------


class Loss:
    """The summed loss of a batch, compiled once for all shapes."""

    def __init__(self, model: Qwen3ForCausalLM, device: str, compiled: bool = True):
        self.weights = dict(model.named_parameters())
        self.config, self.device = model.config, device
        self.cos, self.sin = forward.rope_tables(model.config, CONTEXT, device)  # [CONTEXT, D] each
        self.hidden_states = torch.compile(forward.hidden_states, dynamic=True) if compiled else forward.hidden_states
        self.token_loss = torch.compile(forward.token_loss, dynamic=True) if compiled else forward.token_loss

    def __call__(self, batch: list) -> torch.Tensor:
        """Cross-entropy summed over the trained tokens of a batch padded on the right (nats); logits only for those."""
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch], device=self.device)  # [B, L]
        labels = torch.tensor(
            [labels + [NOT_TRAINED] * (width - len(labels)) for _, labels in batch], device=self.device
        )  # [B, L]
        mask = torch.full((width, width), float("-inf"), device=self.device).triu(
            1
        )  # pads come last: no row looks at them
        hidden = self.hidden_states(
            self.weights, self.config, ids, self.cos[:width], self.sin[:width], mask
        )  # [B, L, H]
        targets = labels[:, 1:].reshape(-1)
        places = (targets != NOT_TRAINED).nonzero()[:, 0]  # [N]
        return self.token_loss(self.weights, hidden[:, :-1].flatten(0, 1).index_select(0, places), targets[places])

    def mean(self, rows: list) -> float:
        """Mean loss a trained token over all rows (nats); not under no_grad, which would compile all once more."""
        return sum(self(batch).item() for batch in batches(rows)) / trained_tokens(rows)


def train_step(model: torch.nn.Module, loss: Loss, optimisers: list, rows: list) -> float:
    """One optimiser step on these rows; returns the mean loss a trained token (nats)."""
    total, count = 0.0, trained_tokens(rows)
    for batch in batches(rows):
        mean = loss(batch) / count
        mean.backward()
        total += mean.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser, _ in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return total


def trained_tokens(rows: list) -> int:
    """How many positions of these rows have a loss."""
    return sum(label != NOT_TRAINED for _, labels in rows for label in labels[1:])


def batches(rows: list) -> list[list]:
    """Rows in order of length, cut where a row would be more than 1.4 times as long as the first of its batch.

    No batch is smaller than two rows or, but for the last, 256 tokens: small products waste the machine, and one row
    would be compiled anew.
    """
    result = [[]]
    for row in sorted(rows, key=lambda row: len(row[0])):
        last = result[-1]
        if len(last) > 1 and len(last) * len(last[-1][0]) >= 256 and len(row[0]) > 1.4 * len(last[0][0]) + 8:
            result.append([])
        result[-1].append(row)
    if len(result) > 1 and len(result[-1]) == 1:
        alone = result.pop()
        result[-1] += alone
    return result


# --- files ----------------------------------------------------------------------------------------


def save_checkpoint(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load; float32, because float16 changes greedy tokens."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def log(out: Path, line: dict) -> None:
    """One JSON line to the screen and to training.log."""
    text = json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()})
    print(text, flush=True)
    with (out / "training.log").open("a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
