"""Text towers: embeddings equal to transformers', and images classified by words."""

import json

import pytest
import torch
from helpers import peers
from helpers.photos import make_photos, noise
from helpers.text_models import END, START, save, save_tokenizer
from PIL import Image
from typer.testing import CliRunner

import vitfast
from vitfast.cli.app import app
from vitfast.images.files import collect
from vitfast.models import checkpoints
from vitfast.models.checkpoints import CheckpointError
from vitfast.pipeline.embed import classify_images, embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, write_parquet
from vitfast.pipeline.search import Index
from vitfast.testing import make

DEVICE = {"device": "cpu"}


@pytest.mark.parametrize(("name", "eos"), [("CLIPModel", 2), ("CLIPModel", 57), ("SiglipModel", 2)])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_text_is_transformers(tmp_path, name, eos, backend):
    model = save(tmp_path, name, eos)
    engine = vitfast.load(tmp_path, backend=backend, **DEVICE)
    ids = torch.randint(1, 56, (3, 24), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((5, 23, 11)):
        ids[row, end:] = 57  # the end, and padding
    with torch.no_grad():
        peers.close(engine.text(ids), model.get_text_features(input_ids=ids).pooler_output)
        short = ids[:, :12] if name == "CLIPModel" else ids
        want = model(input_ids=short, pixel_values=make(2, 3, 32, 32))
    got = engine.text(short, normalize=True)
    peers.close(got, want.text_embeds)
    unit = engine(make(2, 3, 32, 32), normalize=True).embedding
    tower = engine._text.tower
    peers.close(tower.scale * unit @ got.T + (tower.bias or 0), want.logits_per_image)
    assert engine.text(ids[:0]).shape == (0, got.shape[1])


def test_on_triton(tmp_path):
    model = save(tmp_path, "CLIPModel")
    engine = vitfast.load(tmp_path, backend="triton")
    ids = torch.randint(1, 57, (2, 8), generator=torch.Generator().manual_seed(0)).to(engine.device)
    with torch.no_grad():
        peers.close(engine.text(ids).cpu(), model.get_text_features(input_ids=ids.cpu()).pooler_output)


def test_texts_are_tokenized_by_the_familys_own_files(tmp_path):
    library = peers.import_transformers()
    model = save(tmp_path, "CLIPModel", eos=57)
    vocabulary = save_tokenizer(tmp_path)
    engine = vitfast.load(tmp_path, **DEVICE)
    texts = ["a cat.", "A long text that does not fit!"]
    ids = engine._text.ids(texts)
    assert ids.shape == (2, 24)
    first = [vocabulary[word] for word in (START, "a</w>", "c", "a", "t</w>", ".</w>", END)]
    assert ids[0, :7].tolist() == first
    assert ids[1, -1] == vocabulary[END]  # cut, and still ended
    own = library.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        inputs = own(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
        peers.close(engine.text(texts), model.get_text_features(**inputs).pooler_output)


TEMPLATES = ["a photo of {}.", "{}!"]


def test_zero_shot(tmp_path):
    """Against the formula of the paper, computed with transformers' model."""
    library = peers.import_transformers()
    model = save(tmp_path, "CLIPModel", eos=57)
    save_tokenizer(tmp_path)
    engine, own = vitfast.load(tmp_path, **DEVICE), library.AutoTokenizer.from_pretrained(tmp_path)
    x, labels = make(3, 3, 32, 32), ["a cat", "a dog", "a cup"]
    with torch.no_grad():
        rows = []
        for label in labels:
            inputs = own([t.format(label) for t in TEMPLATES], padding=True, return_tensors="pt")
            made = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1).mean(0)
            rows.append(torch.nn.functional.normalize(made, dim=0))
        image = torch.nn.functional.normalize(model.get_image_features(pixel_values=x).pooler_output, dim=-1)
        want = model.logit_scale.exp() * image @ torch.stack(rows).T
    classes = engine.zero_shot(labels, TEMPLATES)
    peers.close(classes(engine(x).embedding), want)
    assert classes.problem_type == "single_label_classification"
    for wrong, reason in (
        (("a cat", TEMPLATES), "labels must be a list of texts, got 'a cat'"),
        (([], TEMPLATES), r"labels must be a list of texts, got \[\]"),
        ((labels, ["a photo"]), r"templates must be a list of texts with \{\} in them"),
    ):
        with pytest.raises(ValueError, match=reason):
            engine.zero_shot(*wrong)


def test_siglip_judges_each_label_by_itself(tmp_path):
    save(tmp_path, "SiglipModel")
    save_tokenizer(tmp_path)
    engine = vitfast.load(tmp_path, **DEVICE)
    Image.fromarray(noise(40, 50)).save(tmp_path / "photo.png")
    classes = engine.zero_shot(["a cat", "a dog"])
    (row,) = classify_images(engine, [tmp_path / "photo.png"], classes=classes)
    logits = classes(engine(tmp_path / "photo.png").embedding)[0]
    got = {found["label"]: found["probability"] for found in row.classes}
    assert got == pytest.approx(dict(zip(classes.labels, logits.sigmoid().tolist(), strict=True)), rel=1e-4)


def test_the_command(tmp_path):
    save(tmp_path, "CLIPModel", eos=57)
    save_tokenizer(tmp_path)
    Image.fromarray(noise(40, 50)).save(tmp_path / "photo.png")
    arguments = ["classify", str(tmp_path / "photo.png"), "-m", str(tmp_path), "--device", "cpu", "--json"]

    def run(*more):
        return CliRunner().invoke(app, [*arguments, *more])

    result = run("--labels", "a cat, a dog")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    engine = vitfast.load(tmp_path, **DEVICE)
    want = engine.zero_shot(["a cat", "a dog"])(engine(tmp_path / "photo.png").embedding)[0].softmax(0)
    got = {found["label"]: found["probability"] for found in row["classes"]}
    assert got == pytest.approx({"a cat": want[0].item(), "a dog": want[1].item()}, rel=1e-4)
    other = json.loads(run("--labels", "a cat,a dog", "--template", "{}", "--template", "{}!").stdout)
    assert other != [row]
    for more, reason in (
        (("--template", "{}"), "--template goes with --labels"),
        (("--labels", ","), "labels must be a list of texts"),
        ((), "no classification head.*--labels"),
    ):
        failed = run(*more)
        assert failed.exit_code == 2
        assert reason.split(".*")[0] in failed.stderr


def test_what_is_missing_is_said(tmp_path):
    model = save(tmp_path, "CLIPModel")
    engine = vitfast.load(tmp_path, **DEVICE)
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        engine.text(["a cat"])
    for ids, reason in (
        (torch.full((1, 25), 1), r"int64 \[T, L\] with L from 1 to 24, got torch.int64 \[1, 25\]"),
        (torch.full((1, 4), 58), "token numbers must be from 0 to 57, got 58 to 58"),
        (torch.ones(1, 4), r"got torch.float32"),
        ("a cat", "texts must be a list of texts or token numbers, got str"),
    ):
        with pytest.raises(ValueError, match=reason):
            engine.text(ids)
    with pytest.raises(ValueError, match="has no text tower: one comes with the folder"):
        vitfast.load(model.vision_model, **DEVICE).text(["a cat"])
    state = model.state_dict()
    del state["text_model.final_layer_norm.weight"], state["text_projection.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"text does not fit its architecture, 2 problem(.|\n)*text_projection"):
        checkpoints.load(tmp_path)


def test_images_similar_to_a_sentence(tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    save(folder, "CLIPModel")
    save_tokenizer(folder)
    photos = make_photos(tmp_path / "photos")
    engine = vitfast.load(folder, **DEVICE)
    write_parquet(embed_images(engine, collect([photos])), EmbeddingFolder(out, folder), engine)
    arguments = ["similar", "a cat", str(out), "--text", "-k", "4", "--device", "cpu", "--json"]
    answer = json.loads(CliRunner().invoke(app, arguments).stdout)
    expected = Index(out).search(engine.text(["a cat"])[0].numpy(), 4)
    assert [match["path"] for match in answer["matches"]] == [match.path for match in expected]
    similarities = [match["similarity"] for match in answer["matches"]]
    assert similarities == pytest.approx([match.similarity for match in expected], abs=1e-5)
    assert answer["query"] == "a cat"
