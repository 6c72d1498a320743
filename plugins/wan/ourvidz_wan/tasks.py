"""The tasks of ``wan_generate``: what each makes, in which sizes, from what. All data, nothing heavy."""

from __future__ import annotations

from enum import StrEnum

from attrs import frozen

_SMALL = ("480*832", "832*480")
_ALL = ("720*1280", "1280*720", *_SMALL)


class Pipeline(StrEnum):
    """The diffusers pipeline that runs a task."""

    TEXT = "WanPipeline"
    IMAGE = "WanImageToVideoPipeline"
    VACE = "WanVACEPipeline"


@frozen(kw_only=True)
class Task:
    """One task of the command line."""

    name: str
    pipeline: Pipeline
    #: Width and height, as ``480*832``.
    sizes: tuple[str, ...] = _ALL
    default_steps: int = 50
    #: Options without which the task cannot run.
    needs: tuple[str, ...] = ()
    #: Options for references that the task reads.
    takes: tuple[str, ...] = ()
    makes_images_only: bool = False


_FRAMES = ("image", "first_frame", "last_frame")

TASKS = {
    task.name: task
    for task in (
        Task(name="t2v-1.3B", pipeline=Pipeline.TEXT, sizes=_SMALL, takes=_FRAMES),
        Task(name="t2v-14B", pipeline=Pipeline.TEXT, takes=_FRAMES),
        Task(
            name="t2i-14B",
            pipeline=Pipeline.TEXT,
            sizes=(*_ALL, "1024*1024"),
            takes=_FRAMES,
            makes_images_only=True,
        ),
        Task(name="i2v-14B", pipeline=Pipeline.IMAGE, default_steps=40, needs=("image",), takes=("image",)),
        Task(
            name="flf2v-14B",
            pipeline=Pipeline.IMAGE,
            needs=("first_frame", "last_frame"),
            takes=("first_frame", "last_frame"),
        ),
        Task(
            name="vace-1.3B",
            pipeline=Pipeline.VACE,
            sizes=_SMALL,
            takes=(*_FRAMES, "src_video", "src_mask", "src_ref_images"),
        ),
        Task(
            name="vace-14B",
            pipeline=Pipeline.VACE,
            takes=(*_FRAMES, "src_video", "src_mask", "src_ref_images"),
        ),
    )
}
