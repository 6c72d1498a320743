"""The facts that are written into a generated file itself, and the mark of AI-made media."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import ourvidz_core

#: IPTC's term for media made by a trained model:
#: https://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def file_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """``facts`` as the text entries of a file: strings as they are, all else as JSON.

    Adds ``software`` and ``digital_source_type``. Holds no time, so that the same job
    makes the same bytes.
    """
    entries = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
        for key, value in facts.items()
        if value is not None
    }
    return {
        **entries,
        "software": f"OurVidz {ourvidz_core.__version__}",
        "digital_source_type": DIGITAL_SOURCE_TYPE,
    }


def xmp_packet(description: str = "") -> str:
    """An XMP packet with the IPTC digital source type and, where given, a description."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        ' xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
        f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{escape(description, quote=False)}</rdf:li></rdf:Alt>'
        "</dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="w"?>'
    )
