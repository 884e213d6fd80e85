"""The protocol `embedded` is really killed while it makes a video, goes on, and does nothing twice."""

import json

from benchmarks.evaluation_resume import main


def test_the_embedded_protocol_survives_sigkill(tmp_path):
    """In small: three scripts of two seconds instead of fifty of sixty; two processes share them, and both are killed."""
    shorter = ["--change", "generation.seconds=2.25", "--change", "suite.shots=3", "--limit", "3"]
    run, output = tmp_path / "run", tmp_path / "resume.json"
    main(["--kills", "1", "--folder", str(run), "--output", str(output), *shorter, "--processes", "2"])
    told = json.loads(output.read_text())
    assert told["videos"] == 3 and told["problems"] == 0
    assert told["files_kept"] >= 2 and told["files_touched"] == 0  # a finished video and its description
    assert told["values_kept"] > 30 and told["values_lost"] == told["values_computed_twice"] == 0
    assert told["left_behind"] == 0  # the torso of the video that was being made
    results = json.loads((run / "results.json").read_text())
    assert results["metrics"]["interactive.probe_adherence"]["of"] == 3
    assert (run / "report.html").is_file()
    shards = [file.read_text() for file in sorted((run / "shards").iterdir())]
    assert len(shards) == 2 and all('"key"' in text for text in shards)  # each process did its share
