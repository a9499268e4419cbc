"""Names in data must stay in their folder: no absolute paths, no `..`, no links that lead out."""

import pytest

from cumo_kernels.files import inside


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for place in ("data/a.png", "data/sub/b.png", "other/c.png"):
        (tmp_path / place).write_text(place)
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["a.png", "./a.png", "sub/b.png", "sub/./b.png", "missing.png"])
def test_names_in_the_folder(folder, name):
    assert inside(folder, name) == folder / name


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../other/c.png", "sub/../../other/c.png", "a\0.png"])
def test_names_that_lead_out_are_refused(folder, name):
    with pytest.raises(ValueError, match="must be a path inside"):
        inside(folder, name)


def test_links_that_lead_out_are_refused(folder, tmp_path):
    (folder / "out.png").symlink_to(tmp_path / "other" / "c.png")
    (folder / "away").symlink_to(tmp_path / "other")
    (folder / "near.png").symlink_to("sub/b.png")
    for name in ("out.png", "away/c.png"):
        with pytest.raises(ValueError, match=r"is a link that leads out of .*other/c\.png"):
            inside(folder, name)
        for advice, end in (("", "c.png'"), ("copy it", "c.png'; copy it")):
            with pytest.raises(ValueError) as error:
                inside(folder, name, advice)
            assert str(error.value).endswith(end)
    assert inside(folder, "near.png").read_text() == "data/sub/b.png"
    (tmp_path / "dataset").symlink_to(folder)
    assert inside(tmp_path / "dataset", "a.png").read_text() == "data/a.png"
    (tmp_path / "data-2").mkdir()  # a name that begins like the folder's
    (folder / "beside").symlink_to(tmp_path / "data-2")
    with pytest.raises(ValueError, match="leads out"):
        inside(folder, "beside/x.png")


def test_a_hugging_face_cache_links_to_its_blobs(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0f"
    (snapshot / "images").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1c").write_text("blob")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1c")
    (snapshot / "images" / "a.png").symlink_to("../../../blobs/1c")
    assert inside(snapshot, "model.safetensors").read_text() == "blob"
    assert inside(snapshot, "images/a.png").read_text() == "blob"
    assert inside(snapshot / "images", "a.png").read_text() == "blob"
    (snapshot / "b.png").symlink_to(tmp_path / "models--c--d" / "blobs" / "1c")
    with pytest.raises(ValueError, match="leads out"):
        inside(snapshot, "b.png")
