"""Classic edits: what a wording means and what must not be taken for one; pixel values by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image, ImageFilter

from llmvis.edit_steps import MAX_SIDE, Crop, Resize, Rotate, Step, Tone
from llmvis.edits import Edit, apply_region, known_edits, parse_edit
from llmvis.schema import UserError
from tests.catalogue import photo

WORDINGS = {
    "grey": "make it black and white|grayscale|convert to greyscale|turn it into a black & white photo|desaturate",
    "25 % brighter": "brighter|Make the picture lighter!|brighten it|increase the brightness|turn up the brightness",
    "20 % brighter": "20% brighter|brighten the image by 20 percent|make it 20 % brighter",
    "10 % brighter": "a little brighter|lighten it a bit|can you make this picture a little bit brighter, please",
    "50 % darker": "much darker|a lot less bright|darken by 50%",
    "25 % more contrast": "more contrast|give it more contrast|with more contrast|boost the contrast of the drawing",
    "10 % less contrast": "reduce the contrast slightly|a bit less contrast|less contrast by 10 %, please",
    "40 % more colourful": "more colorful|more saturated|increase the saturation of the photo|saturate it",
    "30 % less colourful": "desaturate it by 30 %|30% less vivid",
    "10 % warmer": "warmer|make it look warmer|warm it up",
    "5 % cooler": "make the whole picture a bit cooler|slightly colder",
    "100 % sharper": "sharper|sharpen|sharpen the image",
    "blur 1 %": "blur|make it blurry|blur the photo|add blur",
    "blur 5 px": "blur by 5 px|blur it by 5 pixels|add a blur of 5px",
    "resize to 200 %": "twice as large|2x|scale 2x|double the size|enlarge 2 times|scale by a factor of 2|make it 2x",
    "resize to 50 %": "half size|half the size|50% smaller|shrink by half|resize to 50%|2x smaller|downscale 2x",
    "resize to 120 %": "make it 20 % bigger|increase the size by 20%|enlarge it by 20 %",
    "resize to 70 %": "scale down by 30 %|reduce the size to 70%",
    "resize to 512 px": "resize to 512 px|512px|Resize the photo to 512|make it 512 pixels|shrink it to 512 px",
    "resize to 512 px wide": "512 px wide|resize to a width of 512 px|scale the image to 512 px in width",
    "resize to 300 px high": "make it 300 px high|resize to 300 px tall",
    "resize to 512x384 px": "resize to 512x384|512 × 384 pixels|scale to 512 by 384",
    "mirror": "mirror|mirror image|flip horizontally|mirror the image left-right|flip the photo left to right",
    "flip upside down": "flip it upside down|flip vertically|flip the picture top to bottom",
    "rotate 90 degrees anticlockwise": "rotate left|turn it to the left|rotate a quarter turn to the left",
    "rotate 90 degrees clockwise": "rotate right|turn the picture right|rotate it by 450 degrees",
    "rotate 30 degrees anticlockwise": "rotate 30° counter-clockwise|rotate by -30 degrees|turn left by 30 degrees",
    "rotate 180 degrees clockwise": "turn it upside down|rotate by 180 degrees|rotate -180 degrees",
    "crop to 1:1": "crop to a square|crop square|make it square|square crop",
    "crop to 16:9": "crop to 16:9|crop the image to a 16 : 9 ratio|crop to an aspect ratio of 16:9",
    "trim the white border": "trim|trim the borders|crop the white margins|remove the white border around the image",
    "invert": "invert|invert the colors|make a negative|invert the image colours",
    "sepia": "sepia|give it a sepia tone|add a sepia filter|make it sepia toned",
    "posterise to 4 levels": "posterize|posterise the image to 4 levels",
    "autocontrast": "autocontrast|auto contrast|stretch the contrast",
    "equalise": "equalize|equalise the histogram of the picture",
    "on #ffffff ground": "on white|on a white background|put it on white ground|fill the transparent parts with white",
    "on #ff8800 ground": "on #ff8800|on #F80 ground|on a #ff8800 background",
}


@pytest.mark.parametrize("meant", WORDINGS)
def test_natural_wordings_mean_the_edit(meant: str) -> None:
    for wording in WORDINGS[meant].split("|"):
        edit = parse_edit(wording)
        assert edit is not None, wording
        assert edit.describe() == meant, wording


@pytest.mark.parametrize(
    ("sentence", "meant"),
    [
        ("Please make it brighter, then mirror it and crop to 16:9.", "25 % brighter, then mirror, then crop to 16:9"),
        ("First rotate left, and then make it black and white", "rotate 90 degrees anticlockwise, then grey"),
        ("increase brightness and contrast by 20%", "20 % brighter, then 20 % more contrast"),
        ("slightly less contrast and saturation", "10 % less contrast, then 15 % less colourful"),
        ("blur 1.5 px. sharper; 2,5", None),
        ("make it brighter and add a hat", None),
        ("brighter, , warmer", "25 % brighter, then 10 % warmer"),
    ],
)  # fmt: skip
def test_a_sentence_is_an_edit_when_each_clause_is_one(sentence: str, meant: str | None) -> None:
    edit = parse_edit(sentence)
    assert (edit and edit.describe()) == meant


NO_EDITS = (
    "make it a black and white drawing|turn it into a grey painting|sepia illustration|picture of a grey cat|"
    "make it a brighter future painting|colour the drawing|a grey cat|black and white cat|"
    "make the sky brighter|blur the background|sharpen the eyes|bigger ears|make it cool|a mirror|"
    "with a mirror|mirror on the wall|invert the roles|make the background white|"
    "replace the background by white|paint it|in the style of a black and white movie|rotate the cat|"
    "crop the hair|sepia old town|20 %|a little|make it|resize|rotate|crop|half|make it 5|warmer clothes|"
    "a warmer day|brighter eyes|on snow|on a hill|put it on a table|enlarge by half|"
    "make it bigger in the middle|remove the frame|more|grey sky|a picture|turn it into a painting|"
    "darker hair and brighter|20 % 30 % brighter|a negative person|make it darker than night|"
    "make it a poster|posterise the wall|square|a blur of colours|and||, ,|then|"
    "make it slightly black and white|heller|make the eyes much bigger and brighter|"
    "a very bright and warm day|brighter or darker|not brighter"
)


@pytest.mark.parametrize("wording", NO_EDITS.split("|"))
def test_other_instructions_are_left_to_the_model(wording: str) -> None:
    assert parse_edit(wording) is None


def test_long_and_odd_texts_are_no_edits_and_cost_no_time() -> None:
    for text in ["brighter " * 40_000, "9" * 250 + " % brighter?", "\0", "\ud800", "it " * 90, "a bit " * 49]:
        assert parse_edit(text) is None


@pytest.mark.parametrize(
    "wording",
    (
        "resize to 16385 px|resize to 0 px|512x99999|make it 100000000x|100 % smaller|0x|1001 % brighter|101% darker"
        "|crop to 0:9|crop to 101:1|posterise to 1 levels|posterise to 65 levels|blur by 1001 px|blur by 101 %|"
        + "9" * 250
        + " % brighter"
    ).split("|"),
)
def test_absurd_amounts_are_refused_with_what_is_possible(wording: str) -> None:
    with pytest.raises(UserError, match=r"give 2 to 64|ask for|at most"):
        parse_edit(wording)


def test_a_resize_is_refused_when_the_picture_would_be_too_large() -> None:
    edit = parse_edit("10x")
    assert edit is not None and edit(Image.new("RGB", (100, 20))).size == (1000, 200)
    with pytest.raises(UserError, match=f"1 to {MAX_SIDE} px"):
        edit(Image.new("RGB", (1639, 1)))
    with pytest.raises(UserError, match="pixels; ask for less"):
        edit(Image.new("RGB", (1000, 1000)))


def test_known_edits_are_edits_and_cover_every_kind() -> None:
    known = known_edits()
    told = [step for wording, _ in known if (edit := parse_edit(wording)) for step in edit.steps]
    assert len(told) == len({step.describe() for step in told}) == len(known) and all(
        what for _, what in known
    )

    def kind(step: Step) -> object:
        return type(step), getattr(step, "name", None), getattr(step, "quality", None)

    assert {kind(step) for step in told} == {kind(step) for step in _all_steps()}


def _all_steps() -> list[Step]:
    return [parse_edit(wording.split("|")[0]).steps[0] for wording in WORDINGS.values()]


@pytest.mark.parametrize(
    "edit",
    [Edit(steps=(step,)) for step in _all_steps()]
    + [Edit(steps=tuple(_all_steps()[:9]))]
    + [
        Edit(steps=(Tone(quality="warmth", percent=p), Resize(rule="%", first=f), Rotate(degrees=d)))
        for p, f, d in [(0.1, 1 / 3, -179.9), (-12.5, 1e-7, 1e-9), (1000, 100.0, 180.0), (-100, 250, 0.0)]
    ],
    ids=lambda edit: edit.describe(),
)
def test_the_description_and_a_pickle_give_the_same_edit_back(edit: Edit) -> None:
    assert parse_edit(edit.describe()) == edit
    assert pickle.loads(pickle.dumps(edit)) == edit
    assert parse_edit(edit.describe().upper()) == edit


def done(wording: str, *pixels: tuple[int, ...], width: int | None = None) -> list[tuple[int, ...]]:
    """Pixels of a picture, one row unless a width is given, after the edit."""
    width = width or len(pixels)
    values = np.array(pixels, np.uint8).reshape(len(pixels) // width, width, -1)
    edit = parse_edit(wording)
    assert edit is not None
    out = np.asarray(edit(Image.fromarray(values)))
    return [tuple(int(v) for v in p) for p in out.reshape(-1, out.shape[2])]


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("wording", "before", "after"),
    [
        ("grey", [RED, GREEN, BLUE, (10, 20, 30)], [(76,) * 3, (150,) * 3, (29,) * 3, (18,) * 3]),
        ("20 % brighter", [(100, 200, 250), BLACK], [(120, 240, 255), BLACK]),
        ("10 % brighter", [(100, 10, 3)], [(110, 11, 3)]),
        ("50 % darker", [(100, 201, 3)], [(50, 100, 2)]),
        ("50 % more contrast", [(100,) * 3, (200,) * 3], [(75,) * 3, (225,) * 3]),
        ("100 % less contrast", [(100,) * 3, (201,) * 3], [(150,) * 3] * 2),
        ("100 % less colourful", [(10, 20, 30)], [(18, 18, 18)]),
        ("100 % more colourful", [(10, 20, 30), (9, 9, 9)], [(2, 22, 42), (9, 9, 9)]),
        ("10 % warmer", [(100, 100, 100), (250, 250, 200)], [(110, 100, 90), (255, 250, 180)]),
        ("10 % cooler", [(100, 100, 100)], [(90, 100, 110)]),
        ("invert", [(0, 100, 255)], [(255, 155, 0)]),
        ("sepia", [(100, 100, 100), (0, 0, 200)], [(135, 120, 94), (38, 34, 26)]),
        ("posterise to 2 levels", [(0, 127, 128)], [(0, 0, 255)]),
        ("posterise", [(63, 64, 191)], [(0, 85, 170)]),
        ("autocontrast", [(50,) * 3, (100,) * 3, (150,) * 3], [(0,) * 3, (128,) * 3, (255,) * 3]),
        ("mirror", [RED, GREEN, BLUE], [BLUE, GREEN, RED]),
        ("on #102030", [RED], [RED]),
        ("crop square", [RED, GREEN, BLUE], [GREEN]),
        ("trim", [WHITE, (245,) * 3, (244, 255, 255), WHITE, RED, WHITE], [(244, 255, 255), WHITE, RED]),
        ("trim", [WHITE, WHITE], [WHITE, WHITE]),
    ],
)
def test_pixels_of_an_edit(
    wording: str, before: list[tuple[int, int, int]], after: list[tuple[int, int, int]]
) -> None:
    out = done(wording, *before)
    assert len(out) == len(after)
    # a stretch of tones may round the middle either way
    assert np.abs(np.array(out) - after).max() <= (wording == "autocontrast")


def test_turns_move_pixels() -> None:
    square = (RED, GREEN, BLUE, WHITE)  # RED GREEN / BLUE WHITE
    assert done("flip upside down", *square, width=2) == [BLUE, WHITE, RED, GREEN]
    assert done("rotate right", *square, width=2) == [BLUE, RED, WHITE, GREEN]
    assert done("rotate left", *square, width=2) == [GREEN, WHITE, RED, BLUE]
    assert done("turn it upside down", *square, width=2) == [WHITE, BLUE, GREEN, RED]


def test_equalising_spreads_the_histogram() -> None:
    grey = np.repeat(np.arange(100, 116, dtype=np.uint8), 256).reshape(64, 64)
    edit = parse_edit("equalise")
    assert edit is not None
    out = np.asarray(edit(Image.fromarray(grey).convert("RGB")))[..., 0]
    assert out.min() == 0 and out.max() == 255 and len(np.unique(out)) == 16


def test_sharpening_undoes_what_it_is_made_of() -> None:
    """v + (v - b) for 100 %, b the Gaussian of 2 px."""
    picture = photo(40, 30)
    edit = parse_edit("100 % sharper")
    assert edit is not None
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(2))).astype(int)
    expected = (2 * np.asarray(picture).astype(int) - blurred).clip(0, 255)
    assert np.array_equal(np.asarray(edit(picture)), expected)


def test_blur_of_a_share_is_that_of_the_shorter_side() -> None:
    picture = photo(300, 200)
    share, pixels = parse_edit("blur 2 %"), parse_edit("blur by 4 px")
    assert share is not None and pixels is not None
    assert share(picture).tobytes() == pixels(picture).tobytes() != picture.tobytes()


@pytest.mark.parametrize(
    ("wording", "size"),
    [
        ("512 px", (512, 256)),
        ("512 px high", (1024, 512)),
        ("50 px wide", (50, 25)),
        ("2x", (200, 100)),
        ("30x40", (30, 40)),
        ("3x smaller", (33, 17)),
        ("1 px", (1, 1)),
        ("rotate left", (50, 100)),
        ("crop square", (50, 50)),
        ("crop to 16:9", (89, 50)),
        ("crop to 4:1", (100, 25)),
        ("crop to 1:100", (1, 50)),
    ],
)
def test_sizes(wording: str, size: tuple[int, int]) -> None:
    edit = parse_edit(wording)
    assert edit is not None and edit.changes_size
    assert edit(Image.new("RGB", (100, 50))).size == size
    assert edit(Image.new("RGBA", (100, 50))).size == size


def test_rotation_keeps_the_corners_and_fills_them() -> None:
    edit = parse_edit("rotate by 45 degrees")
    assert edit is not None
    opaque = edit(Image.new("RGB", (100, 100), RED))
    assert 141 <= opaque.width <= 143 and opaque.getpixel((0, 0)) == WHITE
    assert opaque.getpixel((71, 71)) == RED
    clear = np.asarray(edit(Image.new("RGBA", (100, 100), (255, 0, 0, 255))))
    assert clear[0, 0, 3] == 0 and (clear[clear[..., 3] > 0][:, :3] == RED).all()  # no dark rim


@pytest.mark.parametrize(
    "wording", ["mirror", "flip upside down", "invert", "rotate by 180 degrees", "rotate by 90 degrees"]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_done_until_it_comes_round_nothing_is_changed(wording: str, mode: str) -> None:
    edit = parse_edit(wording)
    picture = photo(9, 7).convert(mode)
    assert edit is not None and edit(picture).tobytes() != picture.tobytes()
    out = picture
    for _ in range(4 if "90" in wording else 2):
        out = edit(out)
    assert out.mode == mode and out.tobytes() == picture.tobytes()


@pytest.mark.parametrize("wording", [w.split("|")[0] for w in WORDINGS.values()])
def test_alpha_stays_and_what_is_hidden_has_no_say(wording: str) -> None:
    """The same visible pixels over different hidden colours give the same visible pixels."""
    edit = parse_edit(wording)
    assert edit is not None
    pixels = np.asarray(photo(24, 20).convert("RGBA")).copy()
    pixels[:, :12, 3] = 0
    pixels[:, 12:15, 3] = 128
    outs = []
    for hidden in (0, 255):
        pixels[pixels[..., 3] == 0, :3] = hidden
        picture = Image.fromarray(pixels)
        out = edit(picture)
        assert picture.tobytes() == pixels.tobytes(), "the input was changed"
        outs.append(np.asarray(out.convert("RGBA")).astype(int))
        assert out.mode == ("RGB" if "ground" in edit.describe() else "RGBA")
        if not edit.changes_size and "blur" not in wording and "ground" not in edit.describe():
            turned = pixels[:, ::-1] if wording == "mirror" else pixels
            turned = pixels[::-1] if "flip it" in wording else turned
            assert np.array_equal(outs[-1][..., 3], turned[..., 3])
    assert np.array_equal(outs[0][..., 3], outs[1][..., 3])
    assert np.array_equal(outs[0][outs[0][..., 3] > 0], outs[1][outs[1][..., 3] > 0])


def test_ground_shows_through() -> None:
    assert done("on #0000ff", (255, 0, 0, 0), (255, 0, 0, 255), (255, 0, 0, 51)) == [BLUE, RED, (51, 0, 204)]


def test_trim_takes_transparent_borders_too() -> None:
    clear, solid = (0, 0, 0, 0), (9, 9, 9, 255)
    assert done("trim", clear, clear, solid, clear, solid, (255,) * 4) == [solid, clear, solid]


def test_other_modes_are_refused() -> None:
    edit = parse_edit("mirror")
    assert edit is not None
    with pytest.raises(UserError, match="RGB or RGBA"):
        edit(Image.new("L", (2, 2)))


def test_a_region_takes_the_edit_and_the_rest_does_not() -> None:
    original, edited = Image.new("RGB", (3, 1), (100, 0, 0)), Image.new("RGB", (3, 1), (200, 0, 50))
    mask = Image.fromarray(np.array([[0, 51, 255]], np.uint8))
    out = np.asarray(apply_region(original, edited, mask))
    assert out.tolist() == [[[100, 0, 0], [120, 0, 10], [200, 0, 50]]]


def test_a_region_of_a_transparent_picture_gives_no_hidden_colour_away() -> None:
    pixels = np.array([[(0, 255, 0, 0), (0, 255, 0, 0), (0, 255, 0, 0), (10, 10, 10, 255)]], np.uint8)
    original, edited = Image.fromarray(pixels), Image.new("RGB", (4, 1), RED)
    mask = Image.fromarray(np.array([[0, 51, 255, 0]], np.uint8))
    out = np.asarray(apply_region(original, edited, mask))
    assert out.tolist() == [[[0, 255, 0, 0], [255, 0, 0, 51], [255, 0, 0, 255], [10, 10, 10, 255]]]


def test_a_region_refuses_edits_that_change_the_size() -> None:
    original = Image.new("RGB", (4, 4))
    with pytest.raises(UserError, match="resize, rotate, crop, trim"):
        apply_region(original, Image.new("RGB", (4, 5)), Image.new("L", (4, 4)))
    for mask in (Image.new("L", (5, 4)), Image.new("RGB", (4, 4))):
        with pytest.raises(UserError, match="mode L"):
            apply_region(original, original, mask)


def test_a_crop_is_centred() -> None:
    picture = photo(11, 4)
    assert Crop(ratio=(1, 1))(picture).tobytes() == picture.crop((3, 0, 7, 4)).tobytes()
