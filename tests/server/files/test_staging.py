"""A journal that no run of ours wrote is named, and nothing is done."""

from pathlib import Path

import pytest

from engrampool_server.files.staging import JOURNAL_NAME, OutputError, staging


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"source":' * 100_000,
        "[]",
        "{}",
        '{"source": 3, "finished": {}}',
        '{"source": {}, "finished": 3}',
        '{"source": ["a"], "finished": {}}',
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_journal_is_refused(tmp_path: Path, text: str) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / JOURNAL_NAME).write_text(text)
    with (
        pytest.raises(OutputError, match=r"journal\.json is damaged; remove .*out\.partial to start over"),
        staging(tmp_path / "out", {}),
    ):
        pytest.fail("it began")
    assert (partial / JOURNAL_NAME).read_text() == text
