"""What the demo leaves to look at: a contact sheet as one picture, and a page on which videos play."""

from __future__ import annotations

import html
import os
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
    error: str = ""
    metadata: Mapping[str, Any] = field(factory=dict)


_THUMB = 160
_LABEL = 28
_COLUMNS = 6


def draw_sheet(results: Iterable[DemoResult], path: Path) -> None:
    """All results as thumbnails with their names; of a video its first, middle and last frame."""
    from PIL import Image, ImageDraw

    cells = [
        (f"{result.name}\n{label}", picture)
        for result in results
        for asset in result.assets
        for label, picture in _pictures(asset)
    ]
    rows = max(1, -(-len(cells) // _COLUMNS))
    sheet = Image.new("RGB", (_COLUMNS * _THUMB, rows * (_THUMB + _LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, picture) in enumerate(cells):
        left, top = number % _COLUMNS * _THUMB, number // _COLUMNS * (_THUMB + _LABEL)
        scale = min((_THUMB - 8) / picture.width, (_THUMB - 8) / picture.height)
        thumb = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
        sheet.paste(thumb, (left + (_THUMB - thumb.width) // 2, top + (_THUMB - thumb.height) // 2))
        draw.multiline_text((left + 4, top + _THUMB - 2), label, fill="black", spacing=1, font_size=10)
    sheet.save(path)


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
_SHOWN = ("seed", "reference_mode", "reference_method", "generation_time", "model", "width", "height", "frame_num")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       background: #fafaf8; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.25rem }
article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .9rem }
h2 { font-size: 1rem; margin: 0 0 .5rem } .failed h2 { color: #a11 }
img, video { max-width: 100%; max-height: 20rem; border-radius: 3px; margin-right: .3rem; image-rendering: auto }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .7rem; font-size: .85rem; margin: .6rem 0 0 }
dt { color: #777 } dd { margin: 0; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } article { background: #222; border-color: #444 } }
"""


def write_page(results: Sequence[DemoResult], path: Path) -> None:
    """One page with every result, its prompt and the truth about it. Needs no server and no network."""
    cards = "\n".join(_card(result, path.parent) for result in results)
    completed = sum(result.status == "completed" for result in results)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>OurVidz demo</title><style>{_STYLE}</style></head>
<body><h1>OurVidz demo</h1><p>{len(results)} messages, {completed} completed.</p>
<main>
{cards}
</main></body></html>
""",
        "utf-8",
    )


def _card(result: DemoResult, root: Path) -> str:
    media = "".join(_media(asset, root) for asset in result.assets)
    said = {"type": result.job_type, "prompt": result.prompt, "enhanced": result.enhanced_prompt}
    said |= {key: result.metadata.get(key) for key in _SHOWN}
    said["reason"] = result.error
    facts = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in said.items()
        if value not in (None, "")
    )
    head = f"<h2>{html.escape(result.name)}</h2>"
    return f'<article class="{html.escape(result.status)}">{head}{media}<dl>{facts}</dl></article>'


def _media(asset: Path, root: Path) -> str:
    source = html.escape(os.path.relpath(asset, root))
    if asset.suffix == ".mp4":
        return f'<video src="{source}" autoplay loop muted playsinline controls></video>'
    return f'<img src="{source}" alt="{html.escape(asset.name)}">'
