"""Weight-free metrics: closed forms, recorded prototype values, and what they must and must not react to."""

import json
import subprocess

import cv2
import numpy as np
import pytest
from reference import clip

from streamvid.evaluation.appearance import slope, video_drift_error
from streamvid.evaluation.backbones import Backbones
from streamvid.evaluation.engine import measure
from streamvid.evaluation.metrics.repetition import loop_prominence
from streamvid.evaluation.metrics.timing import watch
from streamvid.evaluation.registry import resolve
from streamvid.evaluation.sources import ArraySource, open_source
from streamvid.evaluation.types import Segment, Video


def outcome(metric, frames, fps=16.0, segments=(), borders=(), timings=None, prompt="", **options):
    video = Video("v", "v", prompt, segments=segments, borders=borders, timings=timings or {})
    return measure(video, ArraySource(frames, fps), resolve([{"name": metric, **options}]), Backbones())[
        metric
    ][0]


def score(metric, frames, **more):
    found = outcome(metric, frames, **more)
    assert found.status == "ok", found
    return found.score


def flat(values, size=16):
    return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def test_video_drift_error_of_the_recorded_vector():
    frames = clip("d_drift").astype(float)
    chunks = [float(np.mean([f.std() for f in frames[i : i + 10]])) for i in range(0, 40, 10)]
    assert video_drift_error(chunks, "linear") == pytest.approx(0.7968298580467372, abs=1e-12)
    assert video_drift_error(chunks, "log") == pytest.approx(0.1857172670635186, abs=1e-12)


def test_drift_by_every_definition():
    frames = flat(np.repeat([10, 20, 40, 70], 32))  # two seconds each
    found = outcome("drift.luma", frames).details
    mean_first, mean_last = np.mean([10] * 32 + [20] * 10), np.mean([40] * 10 + [70] * 32)
    assert found["signed"] == pytest.approx(mean_last - mean_first) and found["first_last"] == found["signed"]
    assert found["vde_linear"] == pytest.approx(3 * 1 + 2 * 3 + 1 * 6)
    assert found["slope"] == pytest.approx(slope(np.repeat([10, 20, 40, 70], 2)))
    for name in ("signed", "slope", "vde_linear", "vde_log"):
        assert score("drift.luma", frames, definition=name) == pytest.approx(found[name])
    assert outcome("drift.luma", frames[::-1]).details["signed"] == pytest.approx(-found["signed"])


def test_a_switch_is_no_drift():
    frames = flat([20] * 80 + [200] * 80)
    parts = (Segment(0, 80, "a"), Segment(80, 160, "b"))
    assert score("drift.luma", frames) == 180 and score("drift.luma", frames, segments=parts) == 0
    assert score("drift.look", frames, segments=parts) == 0


def greyed(frame, strength):
    gray = frame.mean(2, keepdims=True)
    return (gray + (frame - gray) / (1 + strength)).astype(np.uint8)


@pytest.mark.parametrize(
    ("metric", "worsen"),
    [
        ("drift.sharpness", lambda f, k: cv2.GaussianBlur(f, (0, 0), 0.1 + 0.3 * k)),
        ("drift.luma", lambda f, k: np.clip(f.astype(int) + 20 * k, 0, 255).astype(np.uint8)),
        ("drift.contrast", lambda f, k: np.clip(128 + (f - 128.0) / (1 + k), 0, 255).astype(np.uint8)),
        ("drift.saturation", greyed),
        ("drift.look", lambda f, k: cv2.GaussianBlur(f, (0, 0), 0.1 + k)),
    ],
)
def test_drift_grows_with_the_failure(metric, worsen):
    base = np.concatenate([clip("c_pan")[:32]] * 3)
    found = []
    for strength in (0.0, 0.5, 1.0, 2.0):
        frames = np.stack([worsen(f, strength * k / 95) for k, f in enumerate(base)])
        found.append(score(metric, frames))
    assert found == sorted(found) and found[-1] > found[0] + 1


def test_noise_grows():
    """Fresh noise in every frame is flicker that no motion explains."""
    rng, pan = np.random.default_rng(0), clip("c_pan")
    noise = rng.normal(0, 1, pan.shape)
    found = [
        score("long.warp_flicker", np.clip(pan + size * noise, 0, 255).astype(np.uint8))
        for size in (0, 2, 4, 8, 16)
    ]
    assert found == sorted(found, reverse=True) and found[-1] < found[0] - 0.02


def test_hue_rotation_lowers_colour_drift():
    hues = np.random.default_rng(0).normal(60, 8, (32, 32))
    found = []
    for turn in (0, 10, 30):
        hsv = [np.full((32, 32, 3), 200, np.uint8) for _ in range(32)]
        for k, picture in enumerate(hsv):
            picture[..., 0] = hues + turn * k / 31
        found.append(score("drift.colour", np.stack([cv2.cvtColor(p, cv2.COLOR_HSV2RGB) for p in hsv])))
    assert found[0] > 99 or found[0] > found[1] > found[2]
    assert found == sorted(found, reverse=True) and found[-1] < 80
    assert score("drift.colour", clip("a_static")) == 100


def test_flicker_net_of_motion_tells_a_pan_from_flicker():
    """Raw flicker ranks them the other way round: this pair is the reason for the metric."""
    pan, flicker = score("long.warp_flicker", clip("c_pan")), score("long.warp_flicker", clip("b_flicker"))
    assert pan > 0.99 > flicker and flicker == pytest.approx(0.9375, abs=0.002)
    raw = [score("vbench.temporal_flickering", clip(name)) for name in ("c_pan", "b_flicker")]
    assert raw[0] < raw[1]


def test_smoothness_falls_with_dropped_and_repeated_frames():
    pan = np.concatenate([clip("c_pan")[:32]] * 2)
    for lose in (
        lambda i, every: i - 1 if i % every == 1 else i,
        lambda i, every: i + 1 if i % every == 1 else i,
    ):
        indices = [[lose(i, every) for i in range(63)] for every in (99, 16, 8, 4)]
        found = [score("long.interpolation_smoothness", pan[rows]) for rows in indices]
        assert found == sorted(found, reverse=True) and found[-1] < found[0] - 0.005
    repeated = [np.repeat(pan, times, axis=0)[:64] for times in (1, 2, 3)]
    found = [outcome("long.freeze", frames).details["still"] for frames in repeated]
    assert found == sorted(found) and found[0] == 0 and found[-1] > 0.6


def test_motion_and_its_loss():
    pan = clip("c_pan")[:32]
    assert score("long.motion", pan) == pytest.approx(3 / 64 * 16, rel=0.15)
    assert score("long.motion", clip("a_static")) == 0
    slowed = np.concatenate([pan, pan, np.repeat(pan[:1], 32, 0)])
    assert score("long.stagnation", slowed) > 0.9
    assert score("long.stagnation", np.concatenate([pan] * 3)) < 0.1
    assert outcome("long.stagnation", clip("a_static")).status == "skipped"


def test_freeze_is_the_longest_run():
    frames = flat([0, 10, 10, 10, 20, 30, 30, 40, 50, 60, 70])
    found = outcome("long.freeze", frames)
    assert found.score == pytest.approx(2 / 10) and found.details["still"] == pytest.approx(3 / 10)


def test_seams_are_seen_at_borders_only():
    rng = np.random.default_rng(0)
    frames = np.cumsum(rng.normal(0, 1, 96))[:, None, None, None] + rng.normal(128, 1, (96, 16, 16, 3))
    chunk = np.arange(96) // 12 % 2 * 6
    seamed = np.clip(frames + chunk[:, None, None, None], 0, 255).astype(np.uint8)
    borders = tuple(range(12, 96, 12))
    assert score("long.seam", seamed, borders=borders) > 3
    assert score("long.seam", frames.clip(0, 255).astype(np.uint8), borders=borders) < 1.5
    assert score("long.seam", seamed, borders=tuple(b + 6 for b in borders)) < 1.5
    assert outcome("long.seam", seamed).status == "skipped"


@pytest.mark.parametrize("period", [8, 10, 16, 24])
def test_loops_are_found_with_their_period(period):
    rng = np.random.default_rng(period)
    steps = np.cumsum(rng.normal(0, 14, (period, 4, 4, 3)), 0)
    tile = np.stack([cv2.resize(np.clip(128 + s, 0, 255).astype(np.uint8), (64, 64)) for s in steps])
    found = outcome("long.loop", np.concatenate([tile] * (96 // period + 1))[:96])
    assert found.score > 0.8
    assert found.details["lag_seconds"] * 16 % period == pytest.approx(0, abs=1.01)


def test_repetition_is_what_was_seen_before():
    rng = np.random.default_rng(5)
    path = np.cumsum(rng.normal(0, 10, (96, 8, 8, 3)), 0)
    frames = np.stack([cv2.resize((128 + p).clip(0, 255).astype(np.uint8), (64, 64)) for p in path])
    assert score("long.repetition", frames) < 0.2
    assert score("long.repetition", frames[np.arange(96) % 20]) > 0.99
    assert outcome("long.repetition", clip("a_static")).status == "skipped"


def test_what_wanders_is_no_loop():
    worst = 0.0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        path = np.cumsum(rng.normal(0, 6, (96, 4, 4, 3)), 0)
        small = np.stack(
            [cv2.resize((128 + p).clip(0, 255).astype(np.float32), (16, 16)).ravel() for p in path]
        )
        worst = max(worst, loop_prominence(small, 16.0)[0])
    assert worst < 0.8
    assert loop_prominence(np.ones((40, 768), np.float32), 16.0) == (0.0, 0)


def test_inserted_first_frames_are_flashbacks():
    rng = np.random.default_rng(1)
    path = np.cumsum(rng.normal(0, 10, (64, 8, 8, 3)), 0) + rng.normal(0, 40, (8, 8, 3))
    frames = np.stack([cv2.resize((128 + p).clip(0, 255).astype(np.uint8), (64, 64)) for p in path])
    assert outcome("long.flashback", frames).details["frames"] == []
    frames[40:43] = frames[:3]
    assert outcome("long.flashback", frames).details["frames"] == [40]
    assert outcome("long.flashback", clip("c_pan")).details["frames"] == [32]  # as recorded: it truly returns


def test_copies_of_the_sink():
    rng = np.random.default_rng(2)
    path = np.cumsum(rng.normal(0, 12, (64, 8, 8, 3)), 0)
    frames = np.stack([cv2.resize((128 + p).clip(0, 255).astype(np.uint8), (64, 64)) for p in path])
    collapsed = frames.copy()
    collapsed[32:] = frames[0]
    assert score("long.sink_copy", collapsed) > 0.95 > score("long.sink_copy", frames) + 0.3


def test_similarity_over_lags():
    found = outcome("long.coherence", np.concatenate([clip("c_pan")[:32]] * 2))
    lags = dict(zip(found.series["lags"], found.series["similarity"], strict=True))
    assert lags[2.0] == pytest.approx(1.0, abs=1e-6) and found.score == pytest.approx(lags[1.0])


def script(*colours, length=40):
    rng = np.random.default_rng(3)
    frames = np.concatenate([np.full((length, 32, 32, 3), c, float) for c in colours])
    frames = (frames + rng.normal(0, 3, frames.shape)).clip(0, 255).astype(np.uint8)
    parts = tuple(Segment(i * length, (i + 1) * length, str(c)) for i, c in enumerate(colours))
    return frames, parts


def test_switches_taken_late_and_ignored():
    frames, parts = script(60, 160)
    assert score("interactive.switch_latency", frames, segments=parts) == 0
    late = frames.copy()
    late[40:53] = frames[:13]
    assert score("interactive.switch_latency", late, segments=parts) == 13
    assert score("interactive.switch_contrast", frames, segments=parts) > 10
    same = np.concatenate([frames[:40], frames[:40]])
    found = outcome("interactive.switch_contrast", same, segments=parts)
    assert found.score < 1 and found.details["ignored"] == 1.0
    assert outcome("interactive.switch_latency", same, segments=parts).status == "skipped"
    assert "never changes" in outcome("interactive.switch_latency", frames).reason


def test_coming_back_to_a_prompt():
    frames, parts = script(60, 160, 60)
    parts = (*parts[:2], Segment(80, 120, parts[0].prompt))
    assert score("interactive.return", frames, segments=parts) == pytest.approx(1.0, abs=0.05)
    stuck = frames.copy()
    stuck[80:] = frames[40:80]
    assert score("interactive.return", stuck, segments=parts) == pytest.approx(0.0, abs=0.05)


def test_the_probe_knows_which_segment_shows_what():
    from streamvid.world.render import render_clip
    from streamvid.world.scene import Scene, Scenery

    first = Scene("ball", "green", "large", "rolls left", "meadow", "day", "clear")
    second = Scene("ball", "red", "large", "rolls left", "sand", "night", "clear")
    frames = render_clip([(0, first), (33, second)], Scenery(0.1, 0, 0, 0, 0, 0), 80)
    texts = [
        "a large green ball rolls left on a meadow by day",
        "a large red ball rolls left on the sand at night",
    ]
    parts = (Segment(0, 33, texts[0]), Segment(33, 80, texts[1]))
    found = outcome("interactive.probe_adherence", frames, segments=parts)
    table = np.array(found.series["matrix"])
    assert found.score == 1.0 and (np.diag(table) == 1.0).all() and table[0, 1] == table[1, 0] == 0.5
    assert found.details["stale"] == 0.0 and found.details["diagonal_wins"] == 1.0
    stale = render_clip([(0, first)], Scenery(0.1, 0, 0, 0, 0, 0), 80)
    found = outcome("interactive.probe_adherence", stale, segments=parts)
    assert found.details["stale"] == 1.0 and found.details["diagonal_wins"] == 0.5


def test_the_probe_reads_compressed_renders(tmp_path):
    """Of windows that no training step drew, compressed as videos are delivered (libx264, crf 23)."""
    from streamvid.io.ffmpeg import ffmpeg_binary
    from streamvid.world.scene import ATTRIBUTES
    from streamvid.world.train_probe import sample_window

    rng = np.random.default_rng(654_321)
    windows, scenes = zip(*[sample_window(rng) for _ in range(24)], strict=True)
    frames, labels = np.concatenate(windows), np.array([scene.labels() for scene in scenes])
    path, probe = tmp_path / "v.mp4", Backbones().get("probe")
    command = [
        ffmpeg_binary(),
        "-v",
        "error",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        "128x128",
        "-r",
        "16",
    ]
    command += ["-i", "pipe:0", "-c:v", "libx264", "-crf", "23", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)
    decoded = np.stack(list(open_source(path).frames())).reshape(24, 32, 128, 128, 3)
    assert not np.array_equal(decoded, np.stack(windows))
    for given, least in ((np.stack(windows), 0.99), (decoded, 0.95)):
        told = probe.classify(given)
        right = np.stack([told[name].numpy() for name in ATTRIBUTES], -1) == labels
        assert right.mean() >= least


def test_a_viewer_waits_only_where_chunks_come_late():
    assert watch([1, 2, 3, 4], [1, 1, 1, 1]).stalls == 0
    seen = watch(
        [1, 2, 5, 6, 7], [1, 1, 1, 1, 1]
    )  # the third is two seconds late, the clock then stands still for them
    assert (seen.stalls, seen.stalled_seconds, seen.misses) == (1, 2.0, 3)
    assert watch([1, 2, 5, 6, 7], [1, 1, 1, 1, 1], buffer=3).stalls == 0
    assert watch([2, 4, 6], [1, 1, 1]).stalled_seconds == 2.0


def test_timing_metrics_need_no_frames():
    timings = {
        "chunk_seconds": [2.0, 0.5, 0.5, 1.5],
        "chunk_frames": [9, 12, 12, 12],
        "switches": [3],
        "peak_memory_mb": 700.5,
    }
    requests = resolve(["timing.*"])
    found = measure(Video("v", "v", fps=16.0, timings=timings), None, requests, Backbones())
    values = {name.split(".")[1]: o.score for name, (o, _) in found.items()}
    assert values["first_chunk"] == 2.0 and values["chunk_p50"] == 0.5 and values["peak_memory"] == 700.5
    assert values["real_time_factor"] == pytest.approx(36 / 16 / 2.5) and values["prompt_to_pixel"] == 1.5
    assert values["deadline_misses"] == pytest.approx(1 / 4)
    assert all(
        o.status == "skipped" for o, _ in measure(Video("v", "v"), None, requests, Backbones()).values()
    )


def test_frames_stay_bounded_whatever_the_length():
    """A metric that fails is one outcome; the others go on. What streams by is not kept."""
    frames = clip("c_pan")
    found = measure(
        Video("v", "v"),
        ArraySource(frames, 16.0),
        resolve(["long.freeze", "vbench.imaging_quality"]),
        _Failing(),
    )
    assert found["long.freeze"][0].status == "ok"
    assert found["vbench.imaging_quality"][0].reason == "ZeroDivisionError: no" and json.dumps(
        found["long.freeze"][1]
    )


class _Failing(Backbones):
    def problem(self, names):
        return None

    def get(self, name):
        def scorer(image):
            raise ZeroDivisionError("no")

        return scorer
