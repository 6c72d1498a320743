"""Refuse prompts that hold a word of a list, and pictures that are mostly black. An extension: it owns no job type."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from statistics import mean
from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen
from attrs.validators import and_, gt, le, optional

from ourvidz_core import Artifact, Job, JobContext, PolicyRefused, hookimpl, load_section

if TYPE_CHECKING:
    from PIL import Image

#: A pixel up to this is black; 255 is white.
BLACK = 16


@frozen(kw_only=True)
class PolicySettings:
    """What is refused. Read from ``OURVIDZ_ACME_POLICY_*``; with nothing set, nothing is."""

    SECTION: ClassVar[str] = "acme_policy"

    #: Words and phrases that no prompt may hold, comma-separated.
    words: list[str] = field(factory=list)
    #: A picture with a larger share of black pixels is refused; of a video, the mean of its frames counts.
    black_share: float | None = field(default=None, validator=optional(and_(gt(0.0), le(1.0))))


@frozen(eq=False)  # plugins are kept in a set
class Policy:
    """The hooks, with the settings of one process."""

    settings: PolicySettings

    @hookimpl
    def review_job(self, job: Job) -> None:
        """Look for the words in the prompt and, once it is rewritten, in what it became."""
        for prompt in (job.prompt, job.enhanced_prompt):
            if prompt is not None and any(holds(prompt, word) for word in self.settings.words):
                # The reason goes to the producer: it names no word, so nobody can learn the list from it.
                raise PolicyRefused("the prompt is against the rules of this service; change it and send it again")

    @hookimpl
    def review_artifact(self, artifact: Artifact, context: JobContext) -> None:
        """Count the black pixels."""
        if self.settings.black_share is None:
            return
        context.progress(0, 1, stage="review")  # ends a job here that was cancelled or is late
        share = mean(black_share(picture) for picture in pictures(artifact))
        if share > self.settings.black_share:
            raise PolicyRefused(
                "the result is almost black; try another seed", details={"black_share": round(share, 3)}
            )


def holds(text: str, word: str) -> bool:
    """Whether ``word`` stands in ``text`` by itself, in any spelling of its letters and of the space around them.

    >>> holds("a FOR\\u200bBIDDEN\\nthing", "forbidden thing"), holds("unforbidden things", "forbidden thing")
    (True, False)
    """
    pattern = r"\s+".join(map(re.escape, _plain(word).split()))
    return bool(pattern) and re.search(rf"(?<!\w){pattern}(?!\w)", _plain(text)) is not None


def _plain(text: str) -> str:
    visible = (character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", "".join(visible)).casefold()


def pictures(artifact: Artifact) -> Iterator[Image.Image]:
    """The picture, or the frames of a video."""
    if artifact.media_type.startswith("video/"):
        import av

        with av.open(artifact.path) as container:
            for frame in container.decode(video=0):
                yield frame.to_image()
        return
    from PIL import Image

    with Image.open(artifact.path) as image:
        yield image


def black_share(picture: Image.Image) -> float:
    """How much of a picture is black, from 0 to 1."""
    histogram = picture.convert("L").histogram()
    return sum(histogram[: BLACK + 1]) / sum(histogram)


#: What the entry point names. A wrong setting fails here: with ``--require acme-policy`` no worker starts then.
policy = Policy(load_section(PolicySettings))
