"""A model is named by its path, or by its name where a distribution offers it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from attrs import frozen

from ourvidz_core.engine.variants import find_model, read_variant
from ourvidz_core.errors import ModelUnavailable
from ourvidz_core.testing.distributions import make_distribution


@frozen(kw_only=True)
class Kind:
    name: str = "as published"
    size_scale: float = 1.0


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution that offers the model ``small`` of the family ``kind``."""
    model = tmp_path / "weights"
    model.mkdir()
    (model / "variant.toml").write_text('name = "small"\nsize_scale = 0.5\n', "utf-8")
    site = tmp_path / "site"
    make_distribution(
        site, "acme-models", f"from pathlib import Path\nKIND = Path({str(model)!r})\n", group="ourvidz.models"
    )
    (site / "acme_models-1.0.dist-info/entry_points.txt").write_text(
        "[ourvidz.models]\nkind = acme_models:KIND\n", "utf-8"
    )
    monkeypatch.syspath_prepend(str(site))
    return model


def test_an_installed_model_is_found_by_its_name(installed: Path) -> None:
    assert find_model(Path("small"), "kind") == installed


def test_a_blocked_distribution_is_not_imported_for_its_models(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURVIDZ_BLOCK_PLUGINS", "acme_models")
    monkeypatch.delitem(sys.modules, "acme_models", raising=False)

    assert find_model(Path("small"), "kind") == Path("small")
    assert "acme_models" not in sys.modules


@pytest.mark.parametrize(("name", "family"), [("small", "other"), ("large", "kind")])
def test_what_nobody_offers_stays_as_it_was_named(installed: Path, name: str, family: str) -> None:
    assert find_model(Path(name), family) == Path(name)


def test_a_path_is_that_path(installed: Path, tmp_path: Path) -> None:
    assert find_model(tmp_path, "kind") == tmp_path


def test_a_model_is_what_its_own_file_says(installed: Path) -> None:
    assert read_variant(installed, Kind) == Kind(name="small", size_scale=0.5)


def test_a_checkpoint_has_its_file_beside_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "lustify.safetensors"
    checkpoint.write_bytes(b"weights")
    assert read_variant(checkpoint, Kind) == Kind()
    (tmp_path / "lustify.variant.toml").write_text('name = "lustify"\n', "utf-8")
    assert read_variant(checkpoint, Kind).name == "lustify"


@pytest.mark.parametrize("text", ["name = ", "size_scale = 'half'"], ids=["no TOML", "wrong type"])
def test_a_description_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "variant.toml").write_text(text, "utf-8")
    with pytest.raises(ModelUnavailable, match=r"variant\.toml"):
        read_variant(tmp_path, Kind)
