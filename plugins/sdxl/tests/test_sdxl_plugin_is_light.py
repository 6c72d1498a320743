"""Listing the job types must not cost what generating does."""

from __future__ import annotations

import subprocess
import sys
import textwrap

HEAVY = ("torch", "diffusers", "transformers", "compel", "PIL", "numpy", "safetensors", "tokenizers")


def test_plugin_registers_and_parses_where_nothing_heavy_can_be_imported() -> None:
    script = textwrap.dedent(
        f"""
        import sys
        sys.path[:] = {sys.path!r}
        sys.modules.update(dict.fromkeys({HEAVY!r}))  # None makes an import fail
        from ourvidz_core.wire.payloads import Payload
        from ourvidz_sdxl import plugin
        types = list(plugin.register_job_types())
        payload = Payload(id="a", type=types[0].name, prompt="two women", user_id="u")
        print([job_type.name for job_type in types], plugin.parse_job(types[0], payload).config.num_images)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "['sdxl_image_fast', 'sdxl_image_high'] 1\n"
