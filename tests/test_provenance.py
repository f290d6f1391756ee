"""What pictures say of themselves: hashes of weights, and text that is a file of settings."""

import hashlib
from pathlib import Path

import pytest
import yaml
from PIL import ExifTags, Image

from engine import inspect
from engine.config import Settings, UserError
from engine.loading import weight_files
from engine.provenance import KEY, Hashes, as_yaml, read_config, require_hash, weights_sha256
from tests.pictures import pixels_of, write_picture

FACTS = {
    "engine": "9.9.9",
    "settings": {"prompt": "ein See: 湖 # kein Kommentar", "seed": 3, "file": {"bits": "16"}},
    "run": {"ranks": 3, "seams": None},
}


@pytest.mark.parametrize(
    ("name", "sample"),
    [("a.png", "uint8"), ("a.tif", "uint16"), ("a.exr", "float16"), ("a.dzi", "uint8"),
     ("a.jpg", "uint8"), ("a.webp", "uint8")],
)  # fmt: skip
def test_what_is_printed_is_a_file_of_settings(tmp_path, capsys, name, sample):
    path = tmp_path / name
    write_picture(path, pixels_of(8, 8, sample), metadata={"prompt": "x", KEY: FACTS})
    assert inspect.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert text == as_yaml(path)
    assert text.startswith(
        f"# {path}: painted by linfusion-engine 9.9.9\n# ranks: 3\n# seams: null"
    )
    assert yaml.safe_load(text) == FACTS["settings"]
    (tmp_path / "again.yaml").write_text(text)
    again = Settings.load(["--config", str(tmp_path / "again.yaml")])
    direct = Settings.load(["--config", str(path)], read_config)
    assert direct == again.model_copy(update={"output": Path("outputs") / name})
    assert (direct.seed, direct.file.bits) == (3, "16")


def test_a_mistake_is_one_sentence(tmp_path, capsys):
    assert inspect.main([str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"error: {tmp_path / 'a.png'}: cannot be read (no such file or directory); give a picture "
        "of this engine\n"
    )


@pytest.mark.parametrize("facts", [None, "no JSON {", [1], {"engine": "1"}, {"settings": []}])
def test_facts_that_are_none(tmp_path, facts):
    metadata = {} if facts is None else {KEY: facts}
    write_picture(tmp_path / "a.png", pixels_of(8, 8), metadata=metadata)
    with pytest.raises(UserError, match="does not say how it was painted"):
        read_config(tmp_path / "a.png")


def test_a_picture_is_not_painted_over_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    write_picture(Path("outputs/a.tif"), pixels_of(8, 8), metadata={KEY: FACTS})
    assert read_config(Path("outputs/a.tif"))["output"] == "outputs/a.again.tif"
    Path("outputs/a.tif").rename("a.tif")
    assert read_config(Path("a.tif"))["output"] == "outputs/a.tif"


@pytest.mark.parametrize("text", ["5", "[1]", "null", '"words"', "{", ""])
@pytest.mark.parametrize("suffix", [".tif", ".jpg", ".webp"])
def test_texts_by_others(tmp_path, suffix, text):
    path = tmp_path / f"picture{suffix}"
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    options = {".tif": {"tiffinfo": exif}, ".jpg": {"comment": text}, ".webp": {"exif": exif}}
    Image.new("RGB", (8, 8)).save(path, **options[suffix])
    with pytest.raises(UserError, match=r"cannot be read \(|does not say how it was painted"):
        read_config(path)


def test_a_yaml_file_is_still_one(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 4")
    assert read_config(tmp_path / "a.yaml") == {"seed": 4}


# --- weights --------------------------------------------------------------------------------------


def model_folder(folder, *names):
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(
        '{"unet": ["diffusers", "X"], "safety_checker": ["diffusers", "Y"]}'
    )
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["unet/model-1-of-2.bin", "unet/model-2-of-2.bin"],
         ["unet/model-1-of-2.bin", "unet/model-2-of-2.bin"]),
        (["unet/model.bin", "unet/model.safetensors"], ["unet/model.safetensors"]),
        (["unet/model.bin"], ["unet/model.bin"]),
        (["unet/model.safetensors", "unet/model.fp16.safetensors"], ["unet/model.safetensors"]),
        (["unet/model.safetensors", "other/model.safetensors"], ["unet/model.safetensors"]),
        (["unet/model.safetensors", "safety_checker/model.bin"], ["unet/model.safetensors"]),
        (["unet/model.safetensors", "unet/lora.safetensors"], ["unet/model.safetensors"]),
    ],
)  # fmt: skip
def test_the_files_that_weights_come_from(tmp_path, names, chosen):
    folder = model_folder(tmp_path / "model", *names)
    assert sorted(weight_files(str(folder))) == chosen
    assert weight_files(str(folder / "unet")) != {}


def test_nothing_is_known_of_a_model_that_is_not_here():
    assert weight_files("nobody/has-this") == {}


def test_a_single_file_has_its_own_hash(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert weights_sha256(weight_files(str(file))) == digest
    require_hash("model", digest, weight_files(str(file)))
    with pytest.raises(UserError, match="model: what is there has the SHA-256"):
        require_hash("model", "0" * 64, weight_files(str(file)))


def test_the_hash_of_a_folder_is_that_of_names_and_contents(tmp_path):
    names = ["unet/model.safetensors", "unet/model-00001-of-00002.safetensors"]
    first, second = (
        weight_files(str(model_folder(tmp_path / place, *order)))
        for place, order in (("x", names), ("y", names[::-1]))
    )
    assert weights_sha256(first) == weights_sha256(second)
    first["unet/model-00001-of-00002.safetensors"].write_bytes(b"other")
    assert weights_sha256(first) != weights_sha256(second)


def test_the_hubs_cache_is_believed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_bytes(b"as if it were 7 GB")
    link = tmp_path / "snapshot" / "model.safetensors"
    link.symlink_to(blob)
    assert weights_sha256({"model.safetensors": link}) == "ab" * 32


def test_a_file_that_is_gone_costs_no_picture(tmp_path, caplog):
    (tmp_path / "a.bin").write_bytes(b"a")
    hashes = Hashes({"model": {"a": tmp_path / "a.bin"}, "linfusion": {"b": tmp_path / "b.bin"}})
    assert hashes.wait() == {"model": hashlib.sha256(b"a").hexdigest()}
    assert "no hash of the linfusion's weights" in caplog.text
