"""Rows of made pictures: their schema, user's columns beside ours, PNG bytes."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from llmvis.made import MADE, features_metadata, image_path, made_schema, png_bytes, user_fields
from llmvis.schema import UserError
from tests.catalogue import photo


def features(schema: pa.Schema) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    return found


def test_the_schema_says_which_column_is_a_picture_and_what_the_others_are() -> None:
    user = [pa.field("stars", pa.float32(), nullable=False), pa.field("words", pa.list_(pa.string()))]
    schema = made_schema(user)
    assert schema.names == [*MADE.names, "stars", "words"]
    found = features(schema)
    assert found["image"] == {"_type": "Image"}
    assert found["seed"] == {"dtype": "int64", "_type": "Value"}
    assert found["stars"] == {"dtype": "float32", "_type": "Value"}
    assert "words" not in found  # nested kinds are found out by the reader
    assert all(field.nullable for field in schema)


def test_a_users_column_called_image_is_no_picture_unless_it_is_one() -> None:
    assert "_type" in features_metadata(MADE)["huggingface"]
    text = pa.schema([("image", pa.string())])
    assert features(text.with_metadata(features_metadata(text)))["image"]["_type"] == "Value"


def test_a_column_with_a_name_of_ours_is_refused_and_user_fields_finds_another_name() -> None:
    user = [pa.field(n, pa.string()) for n in ("prompt", "id", "source_id", "colour", "source_prompt")]
    with pytest.raises(UserError, match=r"'prompt'.*rename"):
        made_schema(user)
    with pytest.raises(UserError, match="'colour'"):
        made_schema([user[3], user[3]])
    names = [field.name for field in user_fields(user)]
    assert names == [
        "source_source_prompt",  # there is a source_prompt already
        "source_source_id",  # of the column id
        "source_source_source_id",
        "colour",
        "source_prompt",
    ]
    assert len(made_schema(user_fields(user))) == len(MADE) + 5


@pytest.mark.parametrize("channels", [3, 4])
def test_png_bytes_are_the_same_each_time_and_give_back_the_pixels(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    data = png_bytes(pixels)
    assert data == png_bytes(pixels.copy()) == png_bytes(np.asfortranarray(pixels))
    image = Image.open(BytesIO(data))
    assert (image.format, image.size) == ("PNG", (7, 5))
    np.testing.assert_array_equal(np.asarray(image), pixels)
    assert not image.info


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["grey", "two channels", "floats", "no pixels"],
)
def test_png_bytes_refuses_what_is_not_8_bit_colour(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        png_bytes(picture)


def test_the_file_name_is_the_id_with_its_ending() -> None:
    assert image_path("00ff") == "00ff.png"
    assert Image.open(BytesIO(png_bytes(np.asarray(photo())))).size == photo().size
