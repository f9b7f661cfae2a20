"""The toy data set: short videos of moving waves, made here, in UCF101's layout."""

import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

MOTIONS = (
    *("Slide0", "Slide22", "Slide45", "Slide67", "Slide90", "Slide112", "Slide135", "Slide157"),
    *("Turn2", "Turn3", "Turn4", "Pulse"),
)


def toy_video(motion: str, rng: np.random.Generator, still: bool = False) -> np.ndarray:
    """One action video (T, 54, 54, 3) uint8, 36 to 48 frames: waves under heavy noise (ours).

    The class is how the waves move: one way or the other along one of eight axes (SlideD, D degrees
    from rows), as a turning star of 2, 3 or 4 arms, or in and out as rings. Colours, wavelength,
    speed, sense, phase, centre and edge are random. Each cube of a clip shows these few numbers in
    part and through the noise: pre-training finds them in videos alone, few labels hardly do.
    `still`: they move inside a disc only, a third of the frame; and a third of the noise.
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
    if still:
        left, top = rng.uniform(-0.2, 0.2, 2) * size
        travelled = travelled * (np.hypot(x - left, y - top) < 0.33 * size)
    wave = np.sin(2 * np.pi * (along - travelled) + phase)
    wave = np.tanh(3 * wave) if rng.random() < 0.5 else wave  # a hard edge, or a soft one
    colour, noise = rng.normal(size=3), rng.normal(size=(frames, size, size, 3))
    colour *= 0.42 * rng.uniform(0.7, 1.3) / np.linalg.norm(colour)
    noise *= 0.05 if still else 0.15
    video = rng.uniform(0.35, 0.65, 3) + wave[..., None] * colour + noise
    return (255 * video).clip(0, 255).round().astype(np.uint8)


def _write(job: tuple) -> None:
    """Write a toy video as XviD-like MPEG-4 at 25 frames and half a megabit per second."""
    path, motion, seed, still = job
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"bf": "1", "g": "250"})
        stream.bit_rate = 500_000
        stream.height, stream.width, stream.pix_fmt = 54, 54, "yuv420p"
        for image in toy_video(motion, np.random.default_rng(seed), still):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def make_toy(out: str | Path, train: int = 1200, test: int = 600, still: bool = False) -> None:
    """Write the toy data set to folder `out` in UCF101's layout, split 1, unless it is there.

    out/Slide0/v_Slide0_g01_c01.avi ..., out/ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt.
    Classes are balanced. The folder appears when it is complete. `still`: see toy_video. ValueError
    if `out` exists and is something else.
    """
    out = Path(out)
    if (out / "ucfTrainTestlist" / "testlist01.txt").is_file():
        return
    if out.exists():
        raise ValueError(f"{out} exists and is no complete toy data set: remove it")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    jobs, lines = [], []
    for i in range(train + test):
        number, label = divmod(i, len(MOTIONS))
        motion = MOTIONS[label]
        name = f"{motion}/v_{motion}_g{number + 1:02}_c01.avi"  # every scene is a group
        jobs.append((part / name, motion, (0, i), still))
        lines.append(f"{name} {label + 1}")
    with ProcessPoolExecutor() as pool:
        done = pool.map(_write, jobs, chunksize=16)
        list(tqdm(done, f"writing {out}", len(jobs), unit="video"))
    lists = {
        "classInd.txt": [f"{label} {name}" for label, name in enumerate(MOTIONS, 1)],
        "trainlist01.txt": sorted(lines[:train]),
        "testlist01.txt": sorted(line.split()[0] for line in lines[train:]),
    }
    (part / "ucfTrainTestlist").mkdir()
    for name, lines in lists.items():
        (part / "ucfTrainTestlist" / name).write_text("\n".join(lines) + "\n")
    part.rename(out)
