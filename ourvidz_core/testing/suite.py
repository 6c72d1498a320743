"""The conformance checks as a class of tests that a plugin's own suite inherits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
from packaging.utils import canonicalize_name

from ourvidz_core.plugins.loading import installed_plugins
from ourvidz_core.testing.conformance import CheckStatus, Subject, run_check
from ourvidz_core.testing.fixtures import environment


class ConformanceSuite:
    """A test for each thing that every plugin must do right.

    ::

        class TestConformance(ConformanceSuite):
            distribution = "acme-upscale"

    The samples of the job types are the messages; ``samples`` are messages to use in their
    place. A model that the plugin needs is named in the environment: override the fixture
    ``environ``. What cannot be looked at, such as the command line of a plugin that builds
    none, is skipped with the reason.
    """

    #: The plugin's distribution, as ``pip install`` names it.
    distribution: ClassVar[str]
    #: Whole messages, each with its ``type``, in place of the samples of those types.
    samples: ClassVar[Sequence[Mapping[str, Any]]] = ()
    #: How long beyond its deadline a generation is waited for.
    patience_seconds: ClassVar[float] = 10.0

    @pytest.fixture(scope="class")
    @classmethod
    def environ(cls) -> Mapping[str, str]:
        """The settings of the plugin, as environment variables; all others of ours are unset."""
        return {}

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, environ: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        """The installed plugin, loaded alone."""
        if not hasattr(cls, "distribution"):
            pytest.fail(f'say which plugin {cls.__name__} is about: distribution = "acme-upscale"', pytrace=False)
        installed = {canonicalize_name(plugin.distribution): plugin for plugin in installed_plugins()}
        plugin = installed.get(canonicalize_name(cls.distribution))
        if plugin is None:
            pytest.fail(f"{cls.distribution} is not installed; pip install --editable . first", pytrace=False)
        with environment(environ):
            subject = Subject(
                plugin,
                root=tmp_path_factory.mktemp("conformance"),
                others=[other for other in installed.values() if other is not plugin],
                messages=cls.samples,
                patience_seconds=cls.patience_seconds,
            )
            if foreign := subject.foreign_types:
                pytest.fail(
                    f"{cls.__name__}.samples hold messages of {foreign}; {cls.distribution} owns"
                    f" {list(subject.record.job_types)}",
                    pytrace=False,
                )
            yield subject

    def test_it_loads(self, subject: Subject) -> None:
        """It is imported, its hooks are known and its job types are right."""
        _demand(subject, "loads")

    def test_importing_it_imports_nothing_heavy(self, subject: Subject) -> None:
        """No torch and no other heavy library, in a process of its own."""
        _demand(subject, "light-import")

    def test_its_names_are_its_own(self, subject: Subject) -> None:
        """No other installed plugin has its job types or commands."""
        _demand(subject, "names")

    def test_its_samples_are_taken(self, subject: Subject) -> None:
        """Each sample message becomes a job."""
        _demand(subject, "samples")

    def test_a_wrong_value_is_refused_with_its_path(self, subject: Subject) -> None:
        """A value of the wrong type is a ``PayloadError``, or reported as ignored."""
        _demand(subject, "wrong-values")

    def test_an_unknown_key_is_reported_as_ignored(self, subject: Subject) -> None:
        """It does not fail the message, and the callback tells of it."""
        _demand(subject, "unknown-keys")

    def test_user_text_stays_one_argument(self, subject: Subject) -> None:
        """No shell reads a command, and no text of a user becomes an option."""
        _demand(subject, "safe-argv")

    def test_its_samples_become_files_that_are_what_they_say(self, subject: Subject) -> None:
        """Each sample is generated, and its files are opened."""
        _demand(subject, "run")

    def test_its_callback_says_what_was_made(self, subject: Subject) -> None:
        """The callback is sent as ``completed`` and holds nothing secret."""
        _demand(subject, "callback")

    def test_a_device_without_memory_is_reported_as_that(self, subject: Subject) -> None:
        """The error type is ``OutOfMemory``."""
        _demand(subject, "out-of-memory")

    def test_a_job_stops_at_its_deadline(self, subject: Subject) -> None:
        """The error type is ``JobTimeout``."""
        _demand(subject, "time-out")

    def test_a_failed_command_is_reported_with_its_exit_status(self, subject: Subject) -> None:
        """The error type is ``CommandFailed``."""
        _demand(subject, "exit-status")

    def test_it_hears_every_event(self, subject: Subject) -> None:
        """``handle_event`` raises on none."""
        _demand(subject, "events")


def _demand(subject: Subject, check: str) -> None:
    result = run_check(subject, check)
    if result.status is CheckStatus.SKIPPED:
        pytest.skip(result.reason)
    if result.flaws:
        pytest.fail("\n".join(f"{subject.distribution}: {flaw}" for flaw in result.flaws), pytrace=False)
