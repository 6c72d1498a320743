"""``ourvidz validate``: every problem of a message at once, and never a good word for what a worker refuses."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import attrs
import ourvidz_sdxl.plugin
import ourvidz_wan.plugin
import ourvidz_wan_enhanced.plugin
import pytest
from attrs import field, frozen, validators
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ourvidz_core import Artifact, ContentType, Generation, JobType, hookimpl
from ourvidz_core.cli.main import main
from ourvidz_core.errors import PayloadError
from ourvidz_core.plugins.loading import load_registry
from ourvidz_core.plugins.registry import Registry
from ourvidz_core.plugins.validation import Examination, ProblemKind, examine
from ourvidz_core.settings import Settings
from ourvidz_core.testing.host import PluginHost, plugin_module
from ourvidz_core.worker.runner import JobRunner, Outcome

ROOT = Path(__file__).parent.parent
URL = "https://a.example/x.png?token=canary"


@frozen(kw_only=True)
class Config:
    count: int = field(default=1, validator=[validators.ge(1), validators.le(6)])
    strength: float = 0.5
    corners: tuple[int, ...] = ()


class Acme:
    """A plugin with the default ways, and one that fails in parse_job."""

    @hookimpl
    def register_job_types(self) -> list[JobType]:
        return [
            JobType(name="acme_fast", queue="q", content_type=ContentType.IMAGE, preset=Config()),
            JobType(name="acme_high", queue="q", content_type=ContentType.IMAGE, bucket="acme_best"),
        ]


class Broken:
    @hookimpl
    def register_job_types(self) -> list[JobType]:
        return [JobType(name="broken", queue="q", content_type=ContentType.IMAGE)]

    @hookimpl
    def parse_job(self) -> None:
        raise KeyError("mine")


@pytest.fixture(scope="module")
def registry() -> Registry:
    modules: dict[str, Any] = {
        "acme": Acme(), "broken": Broken(), "ourvidz-sdxl": ourvidz_sdxl.plugin, "ourvidz-wan": ourvidz_wan.plugin,
        "ourvidz-wan-enhanced": ourvidz_wan_enhanced.plugin,
    }  # fmt: skip
    return load_registry(Settings(), [plugin_module(module, distribution=name) for name, module in modules.items()])


def message(job_type: str = "acme_fast", **changes: object) -> dict[str, Any]:
    return {"id": "job-1", "type": job_type, "prompt": "a toy", "user_id": "user-1", **changes}


def examined(registry: Registry, sent: object) -> Examination:
    return examine(registry, sent if isinstance(sent, bytes) else json.dumps(sent).encode())


def problems_of(registry: Registry, sent: object) -> dict[str, tuple[str, str, str]]:
    found = examined(registry, sent).problems
    assert len({problem.path for problem in found}) == len(found)
    return {problem.path: (problem.kind.value, problem.what, problem.cure) for problem in found}


def test_a_message_that_says_what_will_be_done_has_no_problem(registry: Registry) -> None:
    sent = message(
        config={"count": 3, "strength": 1, "corners": [1, 2], "seed": 0, "expected_time": 4, "image": None},
        metadata={"whatever": {"the": "producer"}, "knows": 1},
        created_at="2026-01-01T00:00:00Z", character_id="c-1", image_id=None, new=None, bucket="acme_fast",
    )  # fmt: skip

    examination = examined(registry, sent)

    assert (examination.problems, examination.job_type, examination.job.config.count) == ((), "acme_fast", 3)


def test_every_problem_is_told_at_once_with_its_cure(registry: Registry) -> None:
    sent = message(
        "sdxl_image_fast",
        id="a b", user_id=5, prompt=" ", created_at="yesterday",
        config={"num_images": 2, "Seed": 4, "widht": 1024}, metadata={"numImages": 3, "credits": 1}, seed=4,
    )  # fmt: skip

    assert problems_of(registry, sent) == {
        "$.id": (
            "refused",
            "a worker refuses 'a b'",
            "send 1 to 128 letters, digits, - and _, beginning with a letter or digit",
        ),
        "$.user_id": ("refused", "a worker refuses 5", "send a string"),
        "$.prompt": ("refused", "a worker refuses ' '", "send a text that says what to show"),
        "$.created_at": ("refused", "a worker refuses 'yesterday'", "send a date and time as ISO 8601 writes it"),
        "$.config.num_images": ("refused", "a worker refuses 2", "send 1, 3 or 6"),
        "$.config.Seed": ("unknown", "nobody reads this key", "did you mean seed?"),
        "$.config.widht": ("unknown", "nobody reads this key", "did you mean width?"),
        "$.metadata.numImages": ("unknown", "nobody reads this key", "did you mean num_images?"),
        "$.seed": ("unknown", "nobody reads this key", "write it as $.config.seed"),
    }


@pytest.mark.parametrize(
    ("sent", "path", "problem"),
    [
        pytest.param(
            message("acme_fats"), "$.type", ("refused", "no plugin owns 'acme_fats'", "did you mean acme_fast?"),
            id="a type that is mistyped",
        ),
        pytest.param(message("unheard"), "$.type", ("refused", "no plugin owns", "install the plugin"), id="no type"),
        pytest.param(message(5), "$.type", ("refused", "a worker refuses 5", "send a string"), id="a type of no kind"),
        pytest.param(b"[]", "$", ("refused", "a JSON array, not an object", "change what"), id="an array"),
        pytest.param(
            message(config={"count": 9}), "$.config.count", ("refused", "'count' must be <= 6: 9", "change what"),
            id="a value that a class refuses",
        ),
        pytest.param(
            message(config={"count": "9"}), "$.config.count", ("refused", "refuses '9'", "send an integer"), id="text"
        ),
        pytest.param(
            message(config={"image": 5}), "$.config.image", ("refused", "refuses 5", "send a string"), id="no URL"
        ),
        pytest.param(
            message(config={"nonsense": 5}), "$.config.nonsense", ("unknown", "nobody reads", "leave it out"),
            id="a key that nobody knows",
        ),
        pytest.param(
            message(config={"prompt": "x"}), "$.config.prompt", ("unknown", "nobody reads", "write it as $.prompt"),
            id="a key of another place",
        ),
        pytest.param(
            message(metadata={"reference_imageurl": URL}), "$.metadata.reference_imageurl",
            ("unknown", "nobody reads", "did you mean reference_image_url?"), id="metadata that is nearly read",
        ),
        pytest.param(
            message(config={"seed": 1}, metadata={"seed": 2}), "$.metadata.seed",
            ("ignored", "the job has the seed 1", "send one seed"), id="two seeds",
        ),
        pytest.param(
            message(config={"expected_time": "soon"}), "$.config.expected_time",
            ("ignored", "'soon' is no time", "number of seconds"), id="no time",
        ),
        pytest.param(
            message("acme_high", bucket="acme_high"), "$.bucket",
            ("ignored", "results of acme_high do not go to 'acme_high'", "send acme_best"), id="another bucket",
        ),
        pytest.param(
            message(created_at="2026-01-01T00:00:00"), "$.created_at",
            ("adapted", "would be read as UTC", "Z or +00:00"), id="a time of no zone",
        ),
        pytest.param(
            message("video_fast", config={"frame_num": 83}), "$.config.frame_num",
            ("adapted", "the job would run with 81, not 83", "send 81"), id="frames that WAN cannot make",
        ),
        pytest.param(
            message("sdxl_image_fast", config={"size": "480*832"}), "$.config.size",
            ("ignored", "the job does not do '480*832'", "leave it out"), id="a size of WAN's for SDXL",
        ),
        pytest.param(
            message("video_fast", config={"reference_strength": 7}), "$.config.reference_strength",
            ("ignored", "does not do 7", "leave it out"), id="a strength of nothing",
        ),
        pytest.param(
            message("video_fast", config={"image": URL, "reference_strength": 0.5},
                    metadata={"reference_strength": 7}),
            "$.metadata.reference_strength", ("ignored", "'reference_strength' must be <= 1.0: 7", "leave it out"),
            id="a wrong value that is hidden by a right one",
        ),
        pytest.param(
            message("broken"), "$", ("refused", "broken failed in parse_job", "tell its authors"), id="a plugin's fault"
        ),
    ],
)  # fmt: skip
def test_a_problem_is_told_with_its_place_and_its_cure(
    registry: Registry, sent: object, path: str, problem: tuple[str, str, str]
) -> None:
    found = problems_of(registry, sent)

    assert list(found) == [path]
    kind, what, cure = found[path]
    assert kind == problem[0]
    assert problem[1] in what
    assert problem[2] in cure
    assert "canary" not in what + cure


PRODUCERS = {
    "sdxl_image_fast": {"sample_shift", "size", "sample_steps", "sample_guide_scale"},
    "sdxl_image_fast_ref_blob_upload": {"sample_shift", "size", "sample_steps", "sample_guide_scale"},
    "video_fast": {"frame_num"},
    "video_fast_ref_both": {"reference_type", "reference_strength", "frame_num"},
    "image7b_fast_enhanced": set(),
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_the_producers_own_messages_have_the_problems_that_their_callbacks_list(registry: Registry, name: str) -> None:
    found = problems_of(registry, (ROOT / f"examples/payloads/{name}.json").read_bytes())

    assert set(found) == {f"$.config.{key}" for key in PRODUCERS[name]}
    assert ProblemKind.REFUSED not in {kind for kind, _, _ in found.values()}


# -- what holds for every message

VALUES = st.sampled_from(
    [None, "", True, 0, 1, 3, 6.5, 83, 512, -1, "x", "unipc", "480*832", "1024*1024", URL, [], [1], {}, {"a": None}]
)
CONFIG_KEYS = st.sampled_from(
    ["count", "strength", "corners", "seed", "image", "size", "frame_num", "num_images", "width", "first_frame",
     "enhance_prompt", "reference_strength", "sample_solver", "expected_time", "unknown"]
)  # fmt: skip
TYPES = ["acme_fast", "acme_high", "sdxl_image_high", "image_fast", "video_fast", "video7b_fast_enhanced", "nobody"]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    job_type=st.sampled_from(TYPES),
    top=st.dictionaries(
        st.sampled_from(["id", "type", "prompt", "user_id", "created_at", "bucket", "config", "metadata", "new"]),
        VALUES,
        max_size=1,
    ),
    config=st.dictionaries(CONFIG_KEYS, VALUES, max_size=3),
    metadata=st.dictionaries(st.sampled_from(["seed", "num_images", "reference_url", "other"]), VALUES, max_size=2),
)
def test_a_worker_refuses_exactly_what_is_said_to_be_refused(
    registry: Registry, job_type: str, top: dict, config: dict, metadata: dict
) -> None:
    raw = json.dumps(message(job_type, **{"config": config, "metadata": metadata, **top})).encode()

    examination = examine(registry, raw)

    refused = [problem for problem in examination.problems if problem.kind is ProblemKind.REFUSED]
    assert (examination.job is None) == bool(refused)
    assert bool(refused) == _is_refused_by_a_worker(registry, raw)


def _is_refused_by_a_worker(registry: Registry, raw: bytes) -> bool:
    nothing: Any = None
    runner = JobRunner(registry=registry, engine=nothing, references=nothing, storage=nothing, workspace=nothing)
    try:
        runner.parse(raw)
    except PayloadError:
        return True
    return False


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=40) | st.recursive(VALUES, st.lists, max_leaves=3).map(json.dumps).map(str.encode))
def test_whatever_comes_is_told_about_and_nothing_raises(registry: Registry, raw: bytes) -> None:
    assert examine(registry, raw).problems


class Draws(Acme):
    """The same plugin, able to make something."""

    @hookimpl
    def generate(self, context: Any) -> Generation:
        path = context.output_path("png")
        Image.linear_gradient("L").save(path)
        return Generation(artifacts=(Artifact(path=path, media_type="image/png"),))


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with PluginHost(tmp_path_factory.mktemp("host"), plugin_module(Draws())) as host:
        sent = message(config={"count": 2, "seed": 5, "expected_time": 3})
        assert examined(host.registry, sent).problems == ()
        return host.run(sent)


def test_a_message_without_problems_completes_in_a_worker(completed: Outcome) -> None:
    assert completed.error is None
    assert completed.callback.metadata["ignored_config"] == {}


def test_the_wire_reference_lists_whatever_a_callback_holds(completed: Outcome) -> None:
    page = (ROOT / "docs/reference/wire-format.md").read_text("utf-8")
    _, _, callbacks = page.partition("## Callbacks")
    listed = set(re.findall(r"`(\w+)`", callbacks))
    whole = attrs.evolve(completed.callback, error_message="why", enhanced_prompt="more").to_json()

    assert set(whole) <= listed
    assert set(whole["metadata"]) <= listed


# -- the command


@pytest.fixture
def ourvidz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line with the SDXL plugin; answers its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OURVIDZ_ALLOW_PLUGINS", "ourvidz-sdxl")

    def run(*arguments: str, stdin: str = "") -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        return main(list(arguments)), capsys.readouterr().out

    return run


def test_the_command_takes_several_messages_and_ends_with_1_where_one_has_a_problem(ourvidz: Any) -> None:
    Path("good.json").write_text(json.dumps(message("sdxl_image_fast")), "utf-8")
    blob = json.dumps(message("sdxl_image_fast", config={"reference_image_url": "blob:https://a.example/1"}))

    code, printed = ourvidz("validate", "good.json", "-", stdin=blob)

    assert code == 1
    assert [line.split()[:3] for line in printed.splitlines() if line] == [
        ["good.json:", "nothing", "to"],
        ["-:", "1", "problem"],
        ["WHERE", "IS", "WHAT"],
        ["the", "single", "reference"],
    ]
    assert "refused  the reference is a blob: URL" in printed


def test_the_command_answers_in_json(ourvidz: Any) -> None:
    code, printed = ourvidz("validate", "--json", "-", stdin=json.dumps(message("sdxl_image_fast", new=1)))

    assert code == 1
    problem = {"path": "$.new", "kind": "unknown", "what": "nobody reads this key", "cure": "leave it out"}
    assert json.loads(printed) == [
        {"file": "-", "job_type": "sdxl_image_fast", "is_valid": False, "problems": [problem]}
    ]


def test_without_a_problem_the_command_ends_with_0(ourvidz: Any) -> None:
    assert ourvidz("validate", "-", stdin=json.dumps(message("sdxl_image_fast"))) == (0, "-: nothing to change\n")


def test_the_schema_comes_as_one_json_document(ourvidz: Any) -> None:
    code, printed = ourvidz("job-types", "--json-schema")

    assert code == 0
    assert set(json.loads(printed)["$defs"]) == {"sdxl_image_fast", "sdxl_image_high"}
