"""The toy data sets, made here: short videos of moving waves, and films for detect.py."""

import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from lib import ava

# Slides are named by their axis, in degrees from rows.
MOTIONS = (*(f"Slide{int(22.5 * i)}" for i in range(8)), "Turn2", "Turn3", "Turn4", "Pulse")


def toy_video(motion: str, rng: np.random.Generator) -> np.ndarray:
    """One action video (T, 54, 54, 3) uint8, 36 to 48 frames: waves under heavy noise (ours).

    The class is how the waves move: one way or the other along one of eight axes (SlideD, D degrees
    from rows), as a turning star of 2, 3 or 4 arms, or in and out as rings. Colours, wavelength,
    speed, sense, phase, centre and edge are random. Each cube shows only a part of these few
    numbers, under noise. Many videos without labels are enough to find them. Few labels are not.
    """
    size = 54
    frames, speed = int(rng.integers(36, 49)), 1.25 * rng.uniform(0.75, 1.33)
    wavelength = 24 * 2 ** rng.uniform(0, 1)
    phase, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(-0.1, 0.1)
    cx, cy = rng.uniform(-0.25, 0.25, 2) * size
    y, x = np.mgrid[:size, :size] - size / 2  # rows count downwards
    if motion.startswith("Slide"):
        angle = MOTIONS.index(motion) * np.pi / 8 + tilt
        along = (x * np.cos(angle) + y * np.sin(angle)) / wavelength
    elif motion.startswith("Turn"):
        along = int(motion[-1]) * np.arctan2(y - cy, x - cx) / (2 * np.pi)
    else:
        along = np.hypot(x - cx, y - cy) / wavelength
    travelled = rng.choice([-1, 1]) * speed * np.arange(frames)[:, None, None] / wavelength
    wave = np.sin(2 * np.pi * (along - travelled) + phase)
    wave = np.tanh(3 * wave) if rng.random() < 0.5 else wave  # a hard edge, or a soft one
    colour, noise = rng.normal(size=3), rng.normal(size=(frames, size, size, 3))
    colour *= 0.42 * rng.uniform(0.7, 1.3) / np.linalg.norm(colour)
    video = rng.uniform(0.35, 0.65, 3) + wave[..., None] * colour + 0.15 * noise
    return (255 * video).clip(0, 255).round().astype(np.uint8)


def _write(job: tuple) -> None:
    """Write a toy video as XviD-like MPEG-4 at 25 frames and half a megabit per second."""
    path, motion, seed = job
    _encode(path, toy_video(motion, np.random.default_rng(seed)), 25, 500_000, bf="1", g="250")


def _encode(path: Path, video: np.ndarray, rate: int, bits: int, **options: str) -> None:
    """Write (T, H, W, 3) uint8 as MPEG-4, `rate` frames and about `bits` bits per second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate, options=options)
        stream.bit_rate = bits
        stream.codec_context.thread_count = 3  # the bytes depend on it, and must not on the machine
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _write_set(out: str | Path, known_by: str, write, jobs: list[tuple], texts) -> None:
    """Write a data set to folder `out`, unless it is there, which its file `known_by` tells.

    write((path, ...)) writes the video of a job (name, ...), texts([what it returns, ...]) is
    {name of a text file: its lines}. The folder appears when it is complete. ValueError if `out`
    exists and is something else.
    """
    out = Path(out)
    if (out / known_by).is_file():
        return
    if out.exists():
        raise ValueError(f"{out} exists and is no complete toy data set: remove it")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with ProcessPoolExecutor() as pool:
        done = pool.map(write, [(part / name, *more) for name, *more in jobs], chunksize=16)
        found = list(tqdm(done, f"writing {out}", len(jobs), unit="video"))
    for name, lines in texts(found).items():
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).write_text("\n".join(lines) + "\n")
    part.rename(out)


def make_toy(out: str | Path, train: int = 1200, test: int = 600) -> None:
    """Write the toy data set to folder `out` in UCF101's layout, split 1, see _write_set.

    out/Slide0/v_Slide0_g01_c01.avi ..., out/ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt.
    Classes are balanced.
    """
    jobs, lines = [], []
    for i in range(train + test):
        number, label = divmod(i, len(MOTIONS))
        motion = MOTIONS[label]
        name = f"{motion}/v_{motion}_g{number + 1:02}_c01.avi"  # every scene is a group
        jobs.append((name, motion, (0, i)))
        lines.append(f"{name} {label + 1}")
    lists = {
        "ucfTrainTestlist/classInd.txt": [f"{i} {name}" for i, name in enumerate(MOTIONS, 1)],
        "ucfTrainTestlist/trainlist01.txt": sorted(lines[:train]),
        "ucfTrainTestlist/testlist01.txt": sorted(line.split()[0] for line in lines[train:]),
    }
    _write_set(out, "ucfTrainTestlist/testlist01.txt", _write, jobs, lambda _: lists)


# ---------------------------------------------------------------------------------- for detect.py

FILM = (80, 96)  # height and width in pixels
SECONDS, RATE = (1, 2), 12  # that are annotated; frames per second


def toy_film(seed) -> tuple[np.ndarray, list[tuple[tuple[float, ...], int]]]:
    """A film (36, *FILM, 3) uint8 of 3 seconds, and its two or three things: (box, action).

    A thing is a window on the waves of a toy video. The number of its motion in MOTIONS, from 1,
    is its action. Boxes (x1, y1, x2, y2) are shares of width and height. The rest is noise.
    """
    rng = np.random.default_rng(seed)
    (height, width), things = FILM, []
    noise = rng.normal(size=((SECONDS[-1] + 1) * RATE, *FILM, 3))
    film = rng.uniform(0.35, 0.65, 3) + 0.15 * noise
    film = (255 * film).clip(0, 255).round().astype(np.uint8)
    # Each has a quarter of the picture to itself.
    for quarter in rng.permutation(4)[: rng.integers(2, 4)].tolist():
        motion = int(rng.integers(len(MOTIONS)))
        high, wide = rng.integers(30, height // 2 + 1), rng.integers(30, width // 2 + 1)
        y = quarter // 2 * height // 2 + int(rng.integers(height // 2 - high + 1))
        x = quarter % 2 * width // 2 + int(rng.integers(width // 2 - wide + 1))
        waves = toy_video(MOTIONS[motion], rng)[: len(film)]
        top, left = (54 - high) // 2, (54 - wide) // 2
        film[:, y : y + high, x : x + wide] = waves[:, top : top + high, left : left + wide]
        box = (x / width, y / height, (x + wide) / width, (y + high) / height)
        things.append((box, motion + 1))
    return film, things


def _write_film(job: tuple) -> list[tuple[tuple[float, ...], int]]:
    path, seed = job
    film, things = toy_film(seed)
    _encode(path, film, RATE, 1_000_000, g="12")
    return things


def make_toy_films(out: str | Path, train: int = 120, test: int = 90) -> None:
    """Write films and their annotations to folder `out` in AVA's format, see _write_set.

    out/toy0001.mp4 ..., and the files that lib/ava.py names. Boxes of the detector are the true
    ones, moved a little, and one of nothing per second, of a low or a high score. A second of one
    test film is excluded.
    """
    names = [f"toy{i:04}" for i in range(train + test)]
    numbers = lambda box: ",".join(f"{side:.3f}" for side in box)

    def texts(films: list) -> dict[str, list[str]]:
        truth, found, rng = {ava.TRAIN: [], ava.TEST: []}, [], np.random.default_rng(2)
        for i, (name, things) in enumerate(zip(names, films, strict=True)):
            for second in SECONDS:
                at = f"{name},{second:04},"
                for person, (box, action) in enumerate(things):
                    line = f"{at}{numbers(box)},{action},{person}"
                    truth[ava.TRAIN if i < train else ava.TEST].append(line)
                    if i >= train:
                        moved = np.clip(box + rng.normal(0, 0.015, 4), 0, 1)
                        found.append(f"{at}{numbers(moved)},,{rng.uniform(0.85, 1):.3f}")
                if i >= train:
                    x, y = rng.uniform(0, 0.6, 2)
                    nothing = numbers((x, y, x + 0.4, y + 0.4))
                    found.append(f"{at}{nothing},,{rng.uniform(0.6, 1):.3f}")
        actions = [f'item {{\n  name: "{name}"\n  id: {i}\n}}' for i, name in enumerate(MOTIONS, 1)]
        excluded = [f"{names[-1]},{SECONDS[0]:04}"]
        return {**truth, ava.ACTIONS: actions, ava.EXCLUDED: excluded, ava.BOXES: found}

    jobs = [(f"{name}.mp4", (1, i)) for i, name in enumerate(names)]
    _write_set(out, ava.BOXES, _write_film, jobs, texts)
