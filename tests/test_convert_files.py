"""What `convert to-hf` writes beside tensors: tokenizer, generation, model card; and uploading all of it."""

import dataclasses
import json
import re

import pytest
from tokenizers import Tokenizer, models

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import preset
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.tokenizer import HFTokenizer
from sparsezoo_jax.huggingface.model_card import Written, code, markdown, model_card, public_name
from tests.test_convert import CONFIGS, call, tensors_of, write

WRITTEN = Written("sparsezoo", 1234, "float32", own_code=True, tokenizer=True, loads=True)


def make_tokenizer(folder):
    """As a run has it: three special tokens, none for what is unknown."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    HFTokenizer(tokenizer).save(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a Llama with a tokenizer of ours."""
    folder = tmp_path_factory.mktemp("llama")
    huggingface.from_hf(write(folder / "source", CONFIGS["llama"], tensors_of(CONFIGS["llama"])), folder / "run")
    make_tokenizer(folder / "run")
    return folder / "run"


def test_tokenizer_that_transformers_takes_as_it_is(run, tmp_path):
    huggingface.to_hf(run, tmp_path / "there")
    stored = json.loads((tmp_path / "there" / "tokenizer_config.json").read_text())
    assert stored == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32,
        "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }
    # What transformers puts before a text is what `generate` puts there.
    given = Tokenizer.from_file(str(tmp_path / "there" / "tokenizer.json"))
    tokenizer = sparsezoo_jax.load(run).tokenizer
    assert given.encode("ab").ids == tokenizer.encode_prompt("ab") == [3, 0, 1]
    assert json.loads((tmp_path / "there" / "generation_config.json").read_text()) == {
        "bos_token_id": 3,
        "eos_token_id": 4,
        "pad_token_id": 2,
    }
    values = json.loads((tmp_path / "there" / "config.json").read_text())
    assert [values[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [3, 4, 2]
    # And a run made of it again takes these for the same tokens.
    huggingface.from_hf(tmp_path / "there", tmp_path / "again")
    again = sparsezoo_jax.load(tmp_path / "again").tokenizer
    assert again.encode_prompt("ab") == [3, 0, 1]
    assert (again.bos_id, again.eos_id, again.pad_id) == (3, 4, 2)


def test_files_of_another_tokenizer_stay_as_they_are(run, tmp_path):
    source = write(tmp_path / "source", CONFIGS["gpt2"], tensors_of(CONFIGS["gpt2"]))
    make_tokenizer(source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<eos>"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    huggingface.from_hf(source, tmp_path / "run")
    huggingface.to_hf(tmp_path / "run", tmp_path / "there")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "there" / name).read_bytes() == (source / name).read_bytes()


def test_auto_tokenizer(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    huggingface.to_hf(run, tmp_path / "there")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    assert tokenizer("ab").input_ids == [3, 0, 1]
    assert tokenizer.decode([3, 0, 1, 4], skip_special_tokens=True).replace(" ", "") == "ab"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (3, 4, 2)
    assert tokenizer.unk_token is None
    assert tokenizer.model_max_length == 32


HOSTILE = "<img src=x onerror=alert(1)> [link](http://evil) ![x](y) `code` **bold** @user | # T\n## H\n```\nrm -rf /"


def test_texts_of_a_run_are_shown_and_not_rendered():
    shown = markdown(HOSTILE)
    assert "\n" not in shown
    assert "<" not in shown
    unescaped = re.sub(r"\\.", "", shown)
    assert not set("`*[]()!#|@_:") & set(unescaped)
    span = code(HOSTILE)
    fence = re.match("`+", span)[0]
    assert "\n" not in span
    assert "|" not in span.replace(r"\|", "")
    assert fence not in span[len(fence) : -len(fence)]
    assert code("`") == "`` ` ``"


def test_card_of_a_hostile_run(tmp_path):
    base = preset("spark")
    config = RunConfig(
        arch=HOSTILE, size=HOSTILE, model=base.model, data=dataclasses.replace(base.data, dataset=HOSTILE)
    )
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": 7, "split": HOSTILE, "loss": HOSTILE, "l0": [1]}))
    card = model_card(tmp_path, config, 7, WRITTEN)
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert front.splitlines()[-1] == "- sparsity"  # the name of the architecture is no tag
    # Outside of code spans, which end at as many backticks as they begin with.
    assert "<img" not in re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", body)
    lines = body.splitlines()
    assert [line for line in lines if line.startswith("##")] == ["## Load"]
    assert sum(line.startswith("#") for line in lines) == 2  # with the title
    assert sum(line.startswith("```") for line in lines) == 4  # two blocks, none of which a text ended
    assert "Loss" not in body  # a loss that is no number is not known


def test_card_says_what_is_known_and_no_more(tmp_path):
    config = preset("spark")
    trained = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=7, seed=3, log_every=1),
        data=dataclasses.replace(config.data, dataset=str(tmp_path)),
    )
    rows = [
        {"step": 7, "loss": 9.0},
        {"step": 3, "split": "validation", "loss": 5.5},
        {"step": 7, "split": "validation", "loss": 4.25, "ffn_density": [0.1, 0.3], "bits_per_byte": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = model_card(tmp_path, trained, 7, WRITTEN, name="me/spark")
    assert "| Loss, nats per token | 4.25 |" in card
    assert "mean over layers | 0.2 |" in card
    assert "Bits per byte" not in card
    assert "AutoModelForCausalLM.from_pretrained('me/spark', trust_remote_code=True)" in card
    assert "hf download me/spark" in card
    assert f"| Corpus | `{tmp_path.name}` |" in card
    assert str(tmp_path) not in card  # a place on this machine is nobody's business
    command = next(line for line in card.splitlines() if line.startswith("sparsezoo train"))
    assert command.startswith("sparsezoo train --arch spark --size tiny ")
    for flag in ("--train.steps 7", "--train.seed 3", f"--data.dataset {tmp_path.name}"):
        assert flag in command
    assert "log-every" not in command
    # Of a converted checkpoint, which nobody trained or measured here.
    plain = model_card(
        tmp_path, RunConfig(arch="dense", size="llama_hf", model=config.model, data=DataConfig(seq_len=16)), 0, WRITTEN
    )
    for absent in ("Corpus", "Tokens seen", "## Measured", "## Train", "license", "language:"):
        assert absent not in plain
    no_code = model_card(tmp_path, config, 0, WRITTEN._replace(own_code=False, loads=False))
    assert "AutoModelForCausalLM" not in no_code


def test_names_of_corpora(tmp_path):
    assert public_name("c4/en") == "c4/en"
    assert public_name("hf://datasets/a/b") == "hf://datasets/a/b"
    assert public_name("gs://bucket/someone/books") == "books"
    assert public_name("/home/someone/secret/books/") == "books"
    assert public_name(str(tmp_path)) == tmp_path.name


class Api:
    """The hub's part that is called, which notes what it is asked for."""

    calls = []
    fault = None

    def _note(self, name, *args, **given):
        if self.fault is not None:
            raise self.fault
        Api.calls.append((name, args, given))
        return f"https://huggingface.co/{args[0]}" if args else {"name": "me"}

    def whoami(self):
        return self._note("whoami")

    def create_repo(self, *args, **given):
        return self._note("create_repo", *args, **given)

    def upload_folder(self, **given):
        files = sorted(path.name for path in given["folder_path"].iterdir())
        return self._note("upload_folder", **{**given, "files": files})


@pytest.fixture
def api(monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library, "HfApi", Api)
    Api.calls, Api.fault = [], None
    return Api


@pytest.mark.parametrize("public", [False, True])
def test_push(public, run, api, tmp_path, monkeypatch, capsys):
    flags = ["--push", "me/model", *(["--public"] * public)]
    assert call(["to-hf", run, tmp_path / "there", *flags], monkeypatch) == 0
    assert "uploaded to https://huggingface.co/me/model" in capsys.readouterr().out
    (_, made, uploaded) = api.calls
    assert made == ("create_repo", ("me/model",), {"private": not public, "exist_ok": True})
    assert uploaded[2]["repo_id"] == "me/model"
    assert uploaded[2]["files"] == sorted(path.name for path in (tmp_path / "there").iterdir())
    assert "from_pretrained('me/model')" in (tmp_path / "there" / "README.md").read_text()


def faults():
    errors = pytest.importorskip("huggingface_hub.errors")

    class Response:
        headers, request, text, status_code = {}, None, "", 403

    class Refused(errors.HfHubHTTPError):
        def __init__(self, status):
            Exception.__init__(self, "refused")
            self.response, self.server_message = Response(), "no\nrights"
            self.response.status_code = status

    return {
        "nobody is logged in to the hub; run: hf auth login": errors.LocalTokenNotFoundError("no token"),
        "HF_HUB_OFFLINE is set": errors.OfflineModeIsEnabled("offline"),
        "the hub does not know this login": Refused(401),
        r"the hub refuses, 403: no\\nrights": Refused(403),
        "can't be reached: no such host": OSError("no such\nhost"),
    }


def test_faults_of_a_push_come_before_any_work(run, api, tmp_path, monkeypatch, capsys):
    for said, fault in faults().items():
        api.fault = fault
        status = call(["to-hf", run, tmp_path / "there", "--push", "me/model"], monkeypatch)
        error = capsys.readouterr().err
        assert re.search(said, error), error
        assert error.strip().count("\n") == 0
        assert status == (1 if isinstance(fault, OSError) and "reached" in said else 2)
        assert not (tmp_path / "there").exists()
    api.fault = None
    for name in ("model", "me/a/b", "me/", "../x", "me/a b"):
        assert call(["to-hf", run, tmp_path / "there", "--push", name], monkeypatch) == 2
        assert "must be OWNER/NAME" in capsys.readouterr().err
    assert call(["to-hf", run, tmp_path / "there", "--public"], monkeypatch) == 2
    assert "is for --push OWNER/NAME only" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()
