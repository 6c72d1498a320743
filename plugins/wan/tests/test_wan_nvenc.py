"""NVENC is used where it works and does as well as x264; here other encoders of FFmpeg stand in for it."""

from __future__ import annotations

import logging
import re

import av
import pytest
from ourvidz_wan import nvenc
from ourvidz_wan.config import EncoderChoice, WanSettings
from ourvidz_wan.doctor import encoder_findings
from ourvidz_wan.generate import run
from ourvidz_wan.nvenc import choose_encoder, nvenc_fault
from ourvidz_wan.video import X264, Encoder, read_facts


@pytest.fixture
def card_with(monkeypatch):
    """A card whose NVENC is another encoder, which is tried anew."""

    def put(encoder):
        monkeypatch.setattr(nvenc, "NVENC", encoder)
        nvenc_fault.cache_clear()

    yield put
    nvenc_fault.cache_clear()


def said(choice):
    settings = WanSettings(video_encoder=choice)
    return [(finding.level.value, finding.message) for finding in encoder_findings(settings)]


@pytest.mark.skipif(nvenc_fault() is None, reason="this machine has NVENC")
def test_without_such_a_card_x264_is_used_and_log_and_doctor_say_why(caplog):
    nvenc_fault.cache_clear()
    with caplog.at_level(logging.INFO, logger="ourvidz_wan"):
        assert choose_encoder(EncoderChoice.AUTO) is choose_encoder(EncoderChoice.AUTO) is X264
    (line,) = caplog.messages
    assert line.startswith("videos are encoded by libx264: h264_nvenc does not work here (")
    assert said(EncoderChoice.AUTO) == [("yellow", line)]


def test_it_is_not_even_tried_unless_asked_for(card_with, monkeypatch):
    card_with(Encoder(name="h264_nvenc", options={}))
    monkeypatch.setattr(nvenc, "_fault", lambda: pytest.fail("it was tried"))
    assert choose_encoder(EncoderChoice.X264) is X264
    assert said(EncoderChoice.X264) == []


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (
            Encoder(name="mpeg4", options={"b": "60000"}),
            r"mpeg4 is off: its frames have [\d.]+ dB where those of libx264",
        ),
        (Encoder(name="h264_nowhere", options={}), r"h264_nowhere does not work here \("),
    ],
    ids=["blurs", "is not built in"],
)
def test_an_encoder_that_is_worse_or_missing_is_passed_over(encoder, reason, card_with):
    card_with(encoder)
    assert choose_encoder(EncoderChoice.AUTO) is X264
    assert re.match(reason, nvenc_fault())


def test_a_card_that_does_as_well_encodes_the_video_and_the_facts_say_so(card_with, asking, models):
    card_with(Encoder(name="mpeg4", options={"b": "20000000"}))
    for choice, name, codec in (("auto", "mpeg4", "mpeg4"), ("libx264", "libx264", "h264")):
        result = run(asking(frame_num=5, sample_steps=1, video_encoder=choice), models, lambda *_: None)
        assert result.facts["video_encoder"] == read_facts(result.path)["video_encoder"] == name
        with av.open(result.path) as container:
            assert container.streams.video[0].codec_context.name == codec
            assert len(list(container.decode(video=0))) == 5
    assert said(EncoderChoice.AUTO) == [("green", "videos are encoded by mpeg4")]
