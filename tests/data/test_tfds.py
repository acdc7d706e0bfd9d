import subprocess
import sys

import pytest

from sparsezoo_jax.data import DataConfig, open_documents
from sparsezoo_jax.errors import DataError


@pytest.fixture(scope="module")
def sotu():
    config = DataConfig()
    return {split: open_documents(config, split) for split in ("train", "validation")}


def test_sotu_holds_out_every_sixteenth_address(sotu):
    ids = {split: [documents[i].id for i in range(len(documents))] for split, documents in sotu.items()}
    assert (len(ids["train"]), len(ids["validation"])) == (234, 15)
    assert ids["train"][:2] == ["1790-Washington-1", "1790-Washington-2"]
    assert ids["validation"][0] == "1804-Jefferson-1"
    assert set(ids["train"]).isdisjoint(ids["validation"])
    years = [int(name.split("-")[0]) for name in ids["validation"]]
    assert years == sorted(years)
    assert {year // 50 for year in years} == {1800 // 50, 1850 // 50, 1900 // 50, 1950 // 50, 2000 // 50}


def test_sotu_texts_are_whole(sotu):
    size = sum(len(d[i].text.encode()) for d in sotu.values() for i in range(len(d)))
    assert size == 12_185_751
    assert sotu["train"][0].text.startswith("Fellow-Citizens of the Senate and House of Representatives:")


def test_sotu_is_prepared_once_silently_and_without_tensorflow(tmp_path):
    code = (
        "import sys; from sparsezoo_jax.data import DataConfig, open_documents;"
        f"d = open_documents(DataConfig(cache_dir={str(tmp_path)!r}), 'train');"
        "print(d.fingerprint, 'tensorflow' in sys.modules, 'pandas' in sys.modules)"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert first.stdout.split()[1:] == ["False", "False"]
    assert first.stdout == second.stdout
    assert first.stderr == second.stderr == ""


def test_tfds_slices_are_splits():
    half = open_documents(DataConfig(validation_split="train[50%:]"), "validation")
    assert len(half) == 117
    other = open_documents(DataConfig(validation_split="train[:50%]"), "validation")
    assert half.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", ["c4/en", "wiki40b/en", "lm1b"])
def test_catalogue_through_mock_data(name, monkeypatch):
    import tensorflow_datasets as tfds

    # Mocked data sets are never prepared, so that Apache Beam would be missed.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)

    with tfds.testing.mock_data(num_examples=5):
        documents = open_documents(DataConfig(dataset=name), "train")
        assert len(documents) == 5
        assert all(isinstance(documents[i].text, str) and documents[i].text for i in range(5))
        assert len({documents[i].id for i in range(5)}) == 5
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "wiki40"}, r"data\.dataset=wiki40: neither a file .* did you mean wiki40b"),
        ({"dataset": "sotuu"}, "did you mean sotu"),
        ({"dataset": "zzqqxx"}, "neither a file on this machine nor a TFDS dataset$"),
        ({"dataset": "c4/xx"}, r"data\.dataset=c4/xx"),
        ({"text_field": "body"}, r"data\.text_field=body: sotu has the fields .*text"),
        ({"train_split": "test"}, r"no documents in split 'test'; it has train, validation"),
        ({"train_split": "train[:0]"}, "no documents"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(DataError, match=message):
        open_documents(DataConfig(**fields), "train")


def test_a_dataset_that_can_not_be_prepared_says_why(tmp_path, monkeypatch):
    def fail(self, **arguments):
        raise ValueError("the server\nsays no")

    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.download_and_prepare", fail)
    with pytest.raises(
        DataError, match=r"imdb_reviews: not prepared in .*can't be prepared here: the server says no$"
    ) as error:
        open_documents(DataConfig(dataset="imdb_reviews", tfds_data_dir=str(tmp_path)), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["c4/en", "wiki40b/en"])
def test_apache_beam_is_asked_for_before_a_download(tmp_path, capfd, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    same = name.replace("c4/", "hf://allenai/c4:").replace("wiki40b/", "hf://google/wiki40b:")
    with pytest.raises(DataError, match=rf"{name}: .* needs Apache Beam: pip install apache-beam.* {same}$"):
        open_documents(DataConfig(dataset=name, tfds_data_dir=str(tmp_path)), "train")
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """Where a data set with features within features is prepared."""
    import tensorflow_datasets as tfds

    class NestedTexts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {
                "meta": {"text": text, "source": {"name": text}},
                "translation": tfds.features.Translation(languages=("en", "de")),
                "answers": tfds.features.Sequence({"text": text}),
                "a.b": text,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(3):
                yield (
                    n,
                    {
                        "meta": {"text": f"peace {n} 日本", "source": {"name": f"source {n}"}},
                        "translation": {"en": f"law {n}", "de": f"Gesetz {n}"},
                        "answers": [{"text": "no"}],
                        "a.b": f"dotted {n}",
                    },
                )

    return tmp_path_factory.mktemp("tfds")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("meta.text", "peace {} 日本"),
        ("meta.source.name", "source {}"),
        ("translation.en", "law {}"),
        ("translation.de", "Gesetz {}"),
        ("a.b", "dotted {}"),
    ],
)
def test_fields_within_fields(nested, field, text):
    config = DataConfig(dataset="nested_texts", text_field=field, tfds_data_dir=str(nested))
    documents = open_documents(config, "train")
    assert sorted(documents[i].text for i in range(3)) == [text.format(n) for n in range(3)]
    assert [document.text for document in documents.read(0)] == [documents[i].text for i in range(3)]


@pytest.mark.parametrize("field", ["meta", "meta.texts", "meta.text.x", "answers", "answers.text", "translation"])
def test_what_is_no_field_is_answered_with_those_there_are(nested, field):
    with pytest.raises(DataError, match=rf"data\.text_field={field}: nested_texts has the fields ") as error:
        open_documents(DataConfig(dataset="nested_texts", text_field=field, tfds_data_dir=str(nested)), "train")
    named = str(error.value).partition(" has the fields ")[2].split(", ")
    assert sorted(named) == ["a.b", "meta.source.name", "meta.text", "translation.de", "translation.en"]


def test_unknown_split_of_the_call():
    with pytest.raises(DataError, match="split=test: must be 'train' or 'validation'"):
        open_documents(DataConfig(), "test")
