"""Clips: decoding, sampling, timestamps and patches, against transformers and Baidu's formulas."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from PIL import Image

from ernie_lab.inputs import video_files
from ernie_lab.inputs.errors import ImageError, VideoError
from ernie_lab.inputs.frame_sampling import baidu_frames, choose_frames, transformers_frames
from ernie_lab.inputs.media import Cell, Grid
from ernie_lab.inputs.preprocessor import Preprocessor, VideoRules
from ernie_lab.inputs.timestamps import BUNDLED_FONT, draw_timestamp, timestamp_text
from ernie_lab.inputs.videos import prepare_video

av = pytest.importorskip("av")

RNG = np.random.default_rng(0)
# Small frames stay small, so that the tests are quick.
SMALL = Preprocessor(video=VideoRules(min_pixels=784, max_pixels=50 * 784))
CLIPS = {
    "as they are": (RNG.integers(0, 256, (4, 448, 560, 3), np.uint8), 2.0),
    "resized": (RNG.integers(0, 256, (3, 120, 200, 3), np.uint8), 1.5),
}
SAMPLES = [(n, r, f) for n in (1, 7, 45, 181, 1000) for r in (2.5, 23.976, 30.0) for f in (None, 2)]
SAMPLES += [(97, 30.0, 29.7), (60, 30.0, 60)]
TIMES = [0.0, 1.5, 59.996, 61.004, 3725.126, 360000.0]


def encode(path: Path, frames: np.ndarray, rate: int = 10, codec: str = "libx264", turn: int = 0):
    """A file of these frames; lossless unless the codec says otherwise."""
    with av.open(str(path), "w") as container:
        lossless = {"crf": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=lossless)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbered(count: int, height: int = 56, width: int = 84) -> np.ndarray:
    """Frame i has brightness 5 i + 10, and a white top left corner."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (10 + 5 * np.arange(count))[:, None, None, None]
    frames[:, : height // 2, : width // 2] = 255
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `numbered` these are, by their lower right corner."""
    return [round((float(frame[-9:, -9:].mean()) - 10) / 5) for frame in frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 frames in 4.5 seconds."""
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(45))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> dict[str, np.ndarray]:
    """What transformers' video processor answers, in a process where it finds torchvision."""
    work = tmp_path_factory.mktemp("oracle")
    for name, (frames, _) in CLIPS.items():
        np.save(work / f"{name}.npy", frames)
    jobs = {
        "font": str(BUNDLED_FONT),
        "samples": {str(sample): sample for sample in SAMPLES},
        "times": {str(seconds): seconds for seconds in TIMES},
        "files": {"clip": str(clip)},
        "clips": {name: rate for name, (_, rate) in CLIPS.items()},
    }
    (work / "jobs.json").write_text(json.dumps(jobs))
    script = Path(support.__file__).parent / "video_oracle.py"
    subprocess.run([sys.executable, str(script), str(work)], check=True, capture_output=True)
    return dict(np.load(work / "answers.npz"))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_transformers_sampling(oracle: dict[str, np.ndarray], sample) -> None:
    n_frames, rate, fps = sample
    assert transformers_frames(n_frames, rate, fps=fps) == oracle[str(sample)].tolist()


@pytest.mark.parametrize(
    "n_frames, rate, indices",
    [
        # 10 s: int(20) in 16..180, every half second.
        (100, 10.0, range(0, 100, 5)),
        # 4.5 s would give 9: the leading frames of 16 intervals, by the written formula.
        (45, 10.0, [i * 45 // 16 for i in range(16)]),
        # 100 s would give 200: 180 intervals.
        (1000, 10.0, [i * 1000 // 180 for i in range(180)]),
        # Shorter than 16 frames: all of them.
        (3, 10.0, range(3)),
        # Half a frame rounds to even, as NumPy does; 16.2 s: int(32.4) is in range, 33 are taken.
        (81, 5.0, [round(i * 2.5) for i in range(33)]),
        # Slower than 2 fps: frames repeat.
        (10, 1.0, [round(i * 0.5) for i in range(20) if round(i * 0.5) < 10]),
    ],
)
def test_baidu_sampling(n_frames: int, rate: float, indices: Sequence[int]) -> None:
    assert baidu_frames(n_frames, rate) == list(indices)


def test_rules_by_name() -> None:
    rules = VideoRules(min_frames=2, max_frames=5)
    assert choose_frames(100, 10.0, rules) == [0, 20, 40, 60, 80]
    assert choose_frames(100, 100.0, replace(rules, fps=3.0)) == [0, 33, 67]
    assert choose_frames(10, 5.0, replace(rules, rule="transformers", fps=2.0)) == [0, 2, 5, 7]


@pytest.mark.parametrize("seconds", TIMES)
def test_timestamp_text(oracle: dict[str, np.ndarray], seconds: float) -> None:
    assert timestamp_text(seconds) == str(oracle[str(seconds)])


def test_timestamp_text_by_hand() -> None:
    assert timestamp_text(3725.126) == "time: 01:02:05.13"


@pytest.mark.parametrize("name", CLIPS)
def test_stamped_frames_equal_transformers(oracle: dict[str, np.ndarray], name: str) -> None:
    frames, rate = CLIPS[name]
    for index, frame in enumerate(frames):
        stamped = np.asarray(draw_timestamp(Image.fromarray(frame), index / rate))
        assert np.array_equal(stamped, oracle[f"{name}.stamped"][index])
        assert not np.array_equal(stamped, frame)


@pytest.mark.parametrize("name, tolerance", [("as they are", 1e-6), ("resized", 0.04)])
def test_patches_equal_transformers(oracle, name: str, tolerance: float) -> None:
    """To 1e-6 on the same pixels. torch resizes by other roundings than Pillow: two levels."""
    frames, rate = CLIPS[name]
    media = prepare_video(frames, Preprocessor(), fps=rate)
    assert oracle[f"{name}.grid"].tolist() == [list(media.grid)]
    difference = np.abs(media.patches_PQ.numpy() - oracle[f"{name}.patches"])
    assert difference.max() <= tolerance
    assert (difference > 1e-6).mean() < 0.02
    assert media.timestamps[:3] == tuple(index / rate for index in range(3))


def test_decoding_equals_transformers(oracle: dict[str, np.ndarray], clip: Path) -> None:
    media = prepare_video(clip, SMALL, rule="transformers", timestamps=False)
    assert media.grid == Grid(46, 4, 6) and media.original_size == (56, 84)
    assert np.array_equal(media.frames[:45], oracle["clip.frames"])
    assert np.array_equal(media.frames[45], media.frames[44])
    assert media.timestamps == pytest.approx([*oracle["clip.seconds"], 4.4])


def test_baidus_rule_on_a_file(clip: Path) -> None:
    media = prepare_video(clip, SMALL, timestamps=False)
    wanted = [i * 45 // 16 for i in range(16)]
    assert numbers(media.frames) == wanted
    assert media.timestamps == pytest.approx([i / 10 for i in wanted])
    assert media.kind == "video" and media.source == str(clip)
    assert len(list(media.cells())) == media.grid.n_tokens == 8 * 2 * 3
    assert list(media.cells())[6] == Cell(2, 0, 0)


def test_bytes_and_paths_agree(clip: Path) -> None:
    media = prepare_video(str(clip), SMALL, fps=1, source="clip")
    assert np.array_equal(media.frames, prepare_video(clip.read_bytes(), SMALL, fps=1).frames)
    assert media.source == "clip"


def test_times_are_drawn_before_resizing(clip: Path) -> None:
    plain = prepare_video(clip, SMALL, timestamps=False).frames
    media = prepare_video(clip, SMALL)
    for frame, bare, seconds in zip(media.frames, plain, media.timestamps, strict=True):
        assert np.array_equal(frame, np.asarray(draw_timestamp(Image.fromarray(bare), seconds)))


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_rotation_in_the_file(tmp_path: Path, turn: int) -> None:
    """Counter-clockwise, as players show it."""
    path = encode(tmp_path / "turned.mp4", numbered(4), turn=turn)
    media = prepare_video(path, SMALL, timestamps=False)
    wanted = np.rot90(numbered(4)[0], turn // 90)
    assert media.original_size == wanted.shape[:2]
    assert np.abs(media.frames[0].astype(int) - wanted).max() <= 3


def test_odd_angles_are_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "askew.mp4", numbered(2), turn=45)
    with pytest.raises(VideoError, match=r"turned by -?45 degrees; only multiples of 90"):
        prepare_video(path, SMALL)


def test_a_container_that_does_not_count(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mkv", numbered(20))
    assert numbers(prepare_video(path, SMALL, fps=30, rule="transformers").frames) == [*range(20)]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_still_picture_is_no_clip(tmp_path: Path, ending: str) -> None:
    """FFmpeg would play it, at 25 frames a second that nobody stated."""
    path = tmp_path / f"x.{ending}"
    Image.new("RGB", (32, 32)).save(path)
    for content in (path, path.read_bytes()):
        with pytest.raises(VideoError, match="is a still picture, expected a clip"):
            prepare_video(content, SMALL)


def test_a_gif_is_a_clip(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in numbered(4)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=100)
    assert prepare_video(tmp_path / "x.gif", SMALL, timestamps=False).grid.t == 4


@pytest.mark.parametrize("missing", [1, 12])
def test_a_header_that_counts_too_many(
    clip: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """A few frames less are sampled anew; many less is a damaged file."""
    honest = video_files.open_clip

    def lying(content, name):
        return replace(honest(content, name), n_frames=45 + missing)

    monkeypatch.setattr("ernie_lab.inputs.videos.open_clip", lying)
    options = {"rule": "transformers", "timestamps": False}
    if missing > 5:
        with pytest.raises(VideoError, match="says it has 57 frames, but only 45 can be decoded"):
            prepare_video(clip, SMALL, **options)
    else:
        assert numbers(prepare_video(clip, SMALL, **options).frames) == [*range(45), 44]


def test_what_is_not_a_clip(clip: Path, tmp_path: Path) -> None:
    content = clip.read_bytes()
    with pytest.raises(VideoError, match="is damaged, cut short, or not a video"):
        prepare_video(content[: len(content) // 2], SMALL)
    with pytest.raises(VideoError, match=r"missing\.mp4: no such file"):
        prepare_video("missing.mp4", SMALL)
    with pytest.raises(VideoError, match="damaged, cut short"):
        prepare_video(b"", SMALL)
    with pytest.raises(VideoError, match="allow_url=True"):
        prepare_video("http://localhost/clip.mp4", SMALL)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(VideoError, match="has no video in it"):
        prepare_video(sound, SMALL)
    with pytest.raises(VideoError, match=r"is of type Image, expected a path.* videos=\[frames\]"):
        prepare_video(Image.new("RGB", (30, 30)), SMALL)
    with pytest.raises(VideoError, match="has no frames"):
        prepare_video([], SMALL)


def test_without_pyav(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match=r'pip install "ernie-lab\[video\]"'):
        prepare_video(clip, SMALL)
    assert prepare_video(list(numbered(2)), SMALL).grid.t == 2


def test_lists_of_frames(tmp_path: Path) -> None:
    frames = numbered(5)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    media = prepare_video(list(frames), SMALL)
    assert numbers(media.frames) == [0, 1, 2, 3, 4, 4] and media.timestamps == ()
    assert media.source == "list of 5"
    paths = sorted(tmp_path.glob("*.png"))
    block = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for same in (paths, [str(path) for path in paths], frames, block, tuple(frames)):
        assert torch.equal(prepare_video(same, SMALL).patches_PQ, media.patches_PQ)
    timed = prepare_video(paths, SMALL, fps=2)
    assert timed.timestamps == (0, 0.5, 1, 1.5, 2, 2)
    assert not np.array_equal(timed.frames, media.frames)
    assert np.array_equal(prepare_video(paths, SMALL, fps=2, timestamps=False).frames, media.frames)


def test_a_single_frame_makes_a_pair() -> None:
    media = prepare_video(numbered(1), SMALL, fps=1)
    assert media.grid == Grid(2, 4, 6) and media.grid.n_tokens == 6
    assert np.array_equal(media.frames[0], media.frames[1])
    assert media.timestamps == (0, 0)


def test_frames_that_are_refused() -> None:
    with pytest.raises(VideoError, match="frame 1 of list of 2 is 30 x 40 pixels, frame 0 is 56"):
        prepare_video([numbered(1)[0], np.zeros((30, 40, 3), np.uint8)], SMALL)
    with pytest.raises(ImageError, match="frame 1 of list of 2"):
        prepare_video([numbered(1)[0], "missing.png"], SMALL)
    with pytest.raises(VideoError, match=r"too small to draw the time on; .*timestamps=False"):
        prepare_video(np.zeros((2, 9, 9, 3), np.uint8), SMALL, fps=1)
    with pytest.raises(VideoError, match="expected a path"):
        prepare_video(numbered(1)[0], SMALL)
    with pytest.raises(ImageError, match="aspect of 250"):
        prepare_video(np.zeros((2, 4, 1000, 3), np.uint8), SMALL)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rule": "vllm"}, 'must be "baidu" or "transformers"'),
        ({"fps": 0}, "fps=0 must be a positive number"),
        ({"fps": float("inf")}, "fps=inf"),
        ({"timestamps": True}, "how fast they pass with fps="),
    ],
)
def test_options_that_are_refused(options: dict, said: str) -> None:
    with pytest.raises(VideoError, match=said):
        prepare_video(numbered(2), SMALL, **options)


def test_fonts(tmp_path: Path) -> None:
    picture = Image.new("RGB", (200, 100), (90, 90, 90))
    stamped = draw_timestamp(picture, 1.5)
    darkest, lightest = stamped.getextrema()[0]
    assert darkest < 10 and lightest == 255
    # Size 10 in Roboto: 17 characters, 77 pixels.
    changed = np.asarray(stamped) != np.asarray(picture)
    assert 70 < np.nonzero(changed.any((0, 2)))[0].max() < 84
    assert np.nonzero(changed.any((1, 2)))[0].max() < 14
    copied = tmp_path / "Roboto-Regular.ttf"
    copied.write_bytes(BUNDLED_FONT.read_bytes())
    assert draw_timestamp(picture, 1.5, copied) == stamped
    with pytest.raises(VideoError, match=r"none\.ttf is not a font that FreeType can read"):
        draw_timestamp(picture, 1.5, tmp_path / "none.ttf")
