"""Where checkpoints come from: names that do not exist, local folders, and a hub that gives only what is read."""

from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from minillm import LLM, load_model
from minillm.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from minillm.model.checkpoints import find_checkpoint
from tiny_models import all_logits, change_config, random_token_ids, random_transformers_model

PROMPT = random_token_ids(20)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "storyteler"])
def test_an_unknown_name_lists_what_exists(name):
    with pytest.raises(ModelNotFoundError, match="storyteller.*local checkpoint folder.*hub id") as error:
        load_model(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["{folder}", "{folder}/", "~/llama", "~/llama/"])
def test_a_folder_may_be_named_with_a_slash_at_its_end_or_from_home(name, copy, monkeypatch, tmp_path):
    folder = copy()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint(name.format(folder=folder)).samefile(folder)


def test_a_revision_of_what_is_not_on_the_hub_is_refused(copy):
    for name in ("storyteller", copy()):
        with pytest.raises(ConfigError, match="revision is 'v1', but .* is local"):
            load_model(name, revision="v1")


def test_an_empty_folder_of_a_hub_models_name_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("someone/something").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="someone/something is an empty folder.*before a model of that name"):
        load_model("someone/something")


def test_a_folder_of_gguf_says_what_to_take_instead(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "tiny-q8.gguf")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="GGUF only .tiny-q8.gguf.*safetensors"):
            load_model(folder, skip_tokenizer_init=True)
        (folder / "config.json").unlink(missing_ok=True)  # as most repositories of GGUF files have it


# --- the hub ---------------------------------------------------------------------------------------------------------

NAME, COMMIT = "someone/something", "c0ffee" * 6 + "c0ff"


class Hub:
    """Stands in for the hub's client: gives the files of one repository, and keeps account of them."""

    def __init__(self, folder: Path, cache: Path, monkeypatch):
        self.folder, self.cache = folder, cache
        self.given: list[str] = []
        self.revisions: set[str | None] = set()
        self.online = True
        for function in (self.hf_hub_download, self.snapshot_download, self.list_repo_files):
            monkeypatch.setattr(f"huggingface_hub.{function.__name__}", function)

    def list_repo_files(self, name, *, revision):
        assert name == NAME
        if not self.online:
            raise OfflineModeIsEnabled("offline mode is enabled")
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def hf_hub_download(self, name, file, *, revision):
        self.revisions.add(revision)
        if not self.online and not (self.cache / COMMIT / file).is_file():
            raise LocalEntryNotFoundError(f"cannot find {file} in the cache")
        if self.online and file not in self.list_repo_files(name, revision=revision):
            raise EntryNotFoundError(f"404: no {file}")
        self.give(file)
        return str(self.cache / COMMIT / file)

    def snapshot_download(self, name, *, revision, allow_patterns):
        assert revision == COMMIT
        assert not any(set("*?[") & set(pattern) for pattern in allow_patterns)
        if self.online:
            for file in set(self.list_repo_files(name, revision=revision)) & set(allow_patterns):
                self.give(file)
        return str(self.cache / COMMIT)

    def give(self, file):
        target = self.cache / COMMIT / file
        if self.online and not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self.folder / file).read_bytes())
            self.given.append(file)


@pytest.fixture
def hub(copy, tmp_path, monkeypatch):
    """A repository with a Llama in it; a test may change its folder."""
    return Hub(copy(), tmp_path / "cache", monkeypatch)


def load_from_hub(**options):
    return load_model(NAME, skip_tokenizer_init=True, **options).model


def test_only_what_will_be_read_is_downloaded(hub, load):
    others = "consolidated.safetensors pytorch_model.bin model.gguf code.py README.md tokenizer.model"
    for other in (
        *others.split(),
        "checkpoint-5/config.json",
        "checkpoint-5/model.safetensors",
        "original/params.json",
    ):
        (hub.folder / other).parent.mkdir(exist_ok=True)
        (hub.folder / other).write_text("{}")
    model = load_from_hub()
    assert (all_logits(model, PROMPT) == all_logits(load("llama"), PROMPT)).all()
    assert hub.given[0] == "config.json" and hub.given[-1] == "model.safetensors"
    assert sorted(hub.given) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]


def test_of_a_sharded_model_the_shards_of_its_index_are_downloaded(hub):
    (hub.folder / "model.safetensors").write_text("another copy of the weights")
    random_transformers_model("llama").save_pretrained(hub.folder, max_shard_size="100KB")
    load_from_hub()
    shards = sorted(path.name for path in hub.folder.glob("model-*.safetensors"))
    assert sorted(file for file in hub.given if file.endswith(".safetensors")) == shards
    assert len(shards) > 2


def test_a_model_that_cannot_run_costs_its_config_alone(hub):
    change_config(hub.folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        load_from_hub()
    assert hub.given == ["config.json"]


def test_the_revision_asked_for_is_loaded(hub):
    load_from_hub(revision="v2")
    LLM(NAME + "/", revision="v3", skip_tokenizer_init=True, verbose=False, num_blocks=20).shutdown()
    assert hub.revisions == {"v2", "v3"}


def test_wrong_dtype_or_device_is_said_before_anything_is_downloaded(hub):
    for options in ({"dtype": "int8"}, {"device": "nowhere"}):
        with pytest.raises(ConfigError):
            load_from_hub(**options)
    assert hub.given == []


def test_the_second_time_it_loads_offline(hub):
    load_from_hub()
    hub.online = False
    load_from_hub()


def test_with_the_config_alone_in_the_cache_and_no_hub_it_says_so(hub):
    (hub.cache / COMMIT).mkdir(parents=True)
    (hub.cache / COMMIT / "config.json").write_text((hub.folder / "config.json").read_text())
    hub.online = False
    with pytest.raises(ModelNotFoundError, match="did not give it all .*offline.*not the whole model"):
        load_from_hub()


def test_a_repository_of_gguf_files_says_so(hub):
    (hub.folder / "model.safetensors").rename(hub.folder / "tiny-q8.gguf")
    (hub.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="someone/something has its weights as GGUF only .tiny-q8.gguf"):
        load_from_hub()
    assert hub.given == []


def test_a_repository_of_pickles_says_so(hub):
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="someone/something has only pickled weights .pytorch_model.bin"):
        load_from_hub()
    assert "pytorch_model.bin" not in hub.given


def test_a_repository_that_is_no_model_says_so(hub):
    (hub.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="someone/something has no config.json"):
        load_from_hub()


def test_a_hub_id_that_cannot_be_had_lists_what_exists(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(ModelNotFoundError, match="'someone/something'.*no connection.*storyteller"):
        load_model("someone/something")


@pytest.mark.parametrize("files", [["config.json"], ["config.json", "generation_config.json", "model.safetensors"]])
def test_the_real_client_reads_its_cache_without_the_hub(files, copy, tmp_path, monkeypatch):
    """The same with the hub's own client, offline, on a cache laid out as it lays it out."""
    cached = tmp_path / "hub" / "models--someone--something"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    folder = copy()
    for file in files:
        (cached / "snapshots" / COMMIT / file).write_bytes((folder / file).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "model.safetensors" in files:
        assert load_from_hub().config.hidden_size == 64
    else:
        with pytest.raises(ModelNotFoundError, match="did not give it all"):
            load_from_hub()
