"""What the demo leaves to look at: a contact sheet as one picture, and a page on which videos play."""

from __future__ import annotations

import html
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

if TYPE_CHECKING:
    from PIL.Image import Image


@frozen(kw_only=True)
class DemoResult:
    """What became of one message."""

    name: str
    job_id: str
    job_type: str
    prompt: str
    enhanced_prompt: str | None
    status: str
    assets: tuple[Path, ...]
    #: The pictures that the message gave, and as what: ``first frame``.
    references: tuple[tuple[str, Path], ...] = ()
    #: Everything that was reported of it.
    callbacks: Path
    error: str = ""
    metadata: Mapping[str, Any] = field(factory=dict)


_THUMB = 140
_CAPTION = 16
_TEXT = 240
_PER_LINE = 3
_COLUMNS = 2
_BLOCK = _TEXT + _PER_LINE * _THUMB
_REFERENCE = 48
_GREY, _OUTLINE = "#777777", "#d8d8d8"


def draw_sheet(results: Iterable[DemoResult], path: Path) -> None:
    """All results with what was asked for, as thumbnails; of a video its first, middle and last frame."""
    from PIL import Image

    blocks = [_draw_block(result) for result in results]
    lines = [blocks[start : start + _COLUMNS] for start in range(0, len(blocks), _COLUMNS)]
    heights = [max(block.height for block in line) for line in lines]
    sheet = Image.new("RGB", (_COLUMNS * _BLOCK, sum(heights)), "white")
    for number, line in enumerate(lines):
        for column, block in enumerate(line):
            sheet.paste(block, (column * _BLOCK, sum(heights[:number])))
    sheet.save(path)


def _draw_block(result: DemoResult) -> Image:
    """One result: on the left its message, on the right what came of it."""
    from PIL import Image, ImageDraw

    cells = [cell for asset in result.assets for cell in _pictures(asset)]
    lines = max(1, -(-len(cells) // _PER_LINE))
    block = Image.new("RGB", (_BLOCK, lines * (_THUMB + _CAPTION) + 8), "white")
    draw = ImageDraw.Draw(block)
    draw.text((8, 8), result.name, fill="black", font_size=14)
    draw.text((8, 26), result.job_type if result.assets else f"{result.job_type}: {result.status}", fill=_GREY)
    asked = [result.prompt, f"enhanced: {result.enhanced_prompt}" if result.enhanced_prompt else "", result.error]
    words = [line for text in asked if text for line in textwrap.wrap(text, _TEXT // 6)]
    draw.multiline_text((8, 44), "\n".join(words[:4]), fill="black", font_size=11, spacing=2)
    for number, (role, reference) in enumerate(result.references):
        left, top = 8 + number * (_TEXT // 2), _THUMB + _CAPTION - _REFERENCE
        with Image.open(reference) as given:
            _paste(block, given, (left, top, _REFERENCE, _REFERENCE))
        draw.multiline_text((left + _REFERENCE + 4, top + 10), f"given as\n{role}", fill=_GREY, font_size=10, spacing=2)
    for number, (label, picture) in enumerate(cells):
        left, top = _TEXT + number % _PER_LINE * _THUMB, number // _PER_LINE * (_THUMB + _CAPTION) + 8
        _paste(block, picture, (left + 4, top, _THUMB - 8, _THUMB - 4))
        draw.text((left + _THUMB // 2, top + _THUMB - 2), label, fill=_GREY, font_size=10, anchor="mt")
    return block


def _paste(onto: Image, picture: Image, box: tuple[int, int, int, int]) -> None:
    """Into the middle of ``box``, left, top, width and height, as large as it fits."""
    from PIL import ImageDraw

    left, top, width, height = box
    scale = min(width / picture.width, height / picture.height)
    thumb = picture.convert("RGB").resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
    left, top = left + (width - thumb.width) // 2, top + (height - thumb.height) // 2
    onto.paste(thumb, (left, top))
    ImageDraw.Draw(onto).rectangle((left, top, left + thumb.width - 1, top + thumb.height - 1), outline=_OUTLINE)


def _pictures(asset: Path) -> Iterator[tuple[str, Image]]:
    from PIL import Image

    if asset.suffix == ".png":
        with Image.open(asset) as image:
            yield f"image {asset.stem.rpartition('_')[2]}", image.convert("RGB")
        return
    import av

    with av.open(str(asset)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    for index in sorted({0, len(frames) // 2, len(frames) - 1}):
        yield f"frame {index}", frames[index]


#: Facts of the callback that the page shows beside a result.
_SHOWN = (
    "seed",
    "seeds",
    "model",
    "size",
    "frame_num",
    "steps",
    "steps_computed",
    "tier",
    "reference_mode",
    "reference_type",
    "reference_method",
    "generation_time",
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       background: #fafaf8; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1.25rem }
article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .9rem }
h2 { font-size: 1rem; margin: 0 } .failed h2, .reason { color: #a11 }
small, dl, figcaption { color: #666; font-size: .8rem }
p { margin: .5rem 0 } .prompt { font-size: 1.05rem } .enhanced::before { content: "enhanced: "; color: #666 }
.media { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0; align-items: end }
.media > a > * { display: block; height: 11rem; max-width: 100%; border: 1px solid #ddd; border-radius: 3px }
figure { margin: 0; text-align: center } figure img { height: 5rem; border: 2px dashed #999; border-radius: 3px }
figcaption { line-height: 1.2 }
dl { display: flex; flex-wrap: wrap; gap: 0 .9rem; margin: .6rem 0 0 }
dt, dd { display: inline; margin: 0; overflow-wrap: anywhere } dd { color: #222 }
@media (min-width: 50rem) { article.many { grid-column: span 2 } }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } article { background: #222; border-color: #444 }
  dd { color: #ddd } small, dl, figcaption, .enhanced::before { color: #999 } a { color: #8bf } }
"""


def write_page(results: Sequence[DemoResult], path: Path) -> None:
    """One page with every result, its prompt and the truth about it. Needs no server and no network."""
    cards = "\n".join(_card(result, path.parent) for result in results)
    completed = sum(result.status == "completed" for result in results)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>OurVidz demo</title><style>{_STYLE}</style></head>
<body><h1>OurVidz demo</h1>
<p>{len(results)} messages went through the queue, {completed} completed. Each card is a message and what came of it:
its prompt, the results, the pictures that it gave (dashed), and what the callback says was done.</p>
<main>
{cards}
</main></body></html>
""",
        "utf-8",
    )


def _card(result: DemoResult, root: Path) -> str:
    media = "".join(_media(asset, root) for asset in result.assets)
    given = "".join(
        f'<figure><img src="{_link(reference, root)}" alt=""><figcaption>{html.escape(role)}</figcaption></figure>'
        for role, reference in result.references
    )
    texts = {"prompt": result.prompt, "enhanced": result.enhanced_prompt, "reason": result.error}
    words = "".join(f'<p class="{name}">{html.escape(text)}</p>' for name, text in texts.items() if text)
    facts = "".join(f"<div><dt>{key}</dt> <dd>{html.escape(value)}</dd></div>" for key, value in _facts(result))
    classes = result.status if len(result.assets) == 1 else f"{result.status} many"
    return (
        f'<article class="{html.escape(classes)}"><h2>{html.escape(result.name)}</h2>'
        f"<small>{html.escape(result.job_type)}</small>{words}"
        f'<div class="media">{media}{given}</div>'
        f'<dl>{facts}<div><a href="{_link(result.callbacks, root)}">callback</a></div></dl></article>'
    )


def _facts(result: DemoResult) -> Iterator[tuple[str, str]]:
    told = dict(result.metadata)
    if len(told.get("seeds", ())) > 1:
        del told["seed"]
    else:
        told.pop("seeds", None)
    if "width" in told:
        told.setdefault("size", f"{told['width']}*{told['height']}")
    if "generation_time" in told:
        told["generation_time"] = f"{told['generation_time']:.1f} s"
    for key in _SHOWN:
        value = told.get(key)
        if value in (None, "") or (key, value) in (("reference_mode", "none"), ("frame_num", 1)):
            continue
        yield key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _media(asset: Path, root: Path) -> str:
    source = _link(asset, root)
    if asset.suffix == ".mp4":
        shown = f'<video src="{source}" autoplay loop muted playsinline></video>'
    else:
        shown = f'<img src="{source}" alt="{html.escape(asset.name)}">'
    return f'<a href="{source}">{shown}</a>'


def _link(path: Path, root: Path) -> str:
    return html.escape(os.path.relpath(path, root))
