"""Videos on disk -> batches of uint8 clips.

    python data.py toy                        # write the toy data set to datasets/toy
    python data.py toy --detect               # toy films for detect.py, to datasets/toy-films
    python data.py check ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist
    python data.py check own --data FOLDER --splits LIST        # or the folder alone
    python data.py prepare ucf101 --data ~/UCF-101 --splits ~/ucfTrainTestlist --out ~/UCF-101-fast

From top to bottom: which frames to take (sample_clip), augmentation, the data sets, their loader.
lib/lists.py knows which files belong to a split (read_split), lib/video.py reads frames, and
lib/prepare.py does what the three commands above say.

A clip is (T, C, H, W) uint8, torchvision's order of a tv_tensors.Video.
"""

import atexit
import gc
import signal
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from lib.lists import Split, read_split  # noqa: F401 (for the stages)
from lib.video import read_frames

TOY = "datasets/toy"  # the toy data set, unless told otherwise
TOY_FILMS = "datasets/toy-films"  # that of detect.py


# -------------------------------------------------------------------------- frame index rules


def fitting_stride(total: int, frames: int, stride: int) -> int:
    """The largest stride up to `stride` at which `frames` frames fit into `total`, at least 1.

    0 stays 0: the clip is one frame, held still.
    """
    return min(stride, max((total - 1) // max(frames - 1, 1), 1))


def sample_clip(total: int, frames: int, stride: int) -> list[int]:
    """Random clip of `frames` frames, `stride` apart, from a video of `total` frames.

    The rule of pre-training (paper section 3.3; official code): the start is uniform on
    0 .. total - frames*stride. A video too short for that first gets the largest stride that fits
    (ours: the official code repeats the last frame). Only one with fewer than `frames` frames
    repeats its last frame. Draws from torch's global generator.
    """
    stride = fitting_stride(total, frames, stride)
    start = int(torch.randint(max(total - max(frames * stride, 1), 0) + 1, ()))
    return [min(start + i * stride, total - 1) for i in range(frames)]


def center_clip(total: int, frames: int, stride: int) -> list[int]:
    """The clip in the middle of the video, without randomness; for figures (ours)."""
    stride = fitting_stride(total, frames, stride)
    start = max(total - (frames - 1) * stride - 1, 0) // 2
    return [min(start + i * stride, total - 1) for i in range(frames)]


def uniform_clip(total: int, frames: int, stride: int = 0) -> list[int]:
    """A random frame from each of `frames` equal parts of the video (TSN sampling; paper: SSv2).

    Part i is the total // frames frames from i * (total // frames) on, as in the official code.
    A video shorter than the clip is spread over it evenly (ours). `stride` plays no part.
    """
    part = total // frames
    if part == 0:
        return [i * total // frames for i in range(frames)]
    return [i * part + int(torch.randint(part, ())) for i in range(frames)]


def dense_views(total: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """Test clips, evenly spread (official code): `frames` in a row of 0, stride, 2*stride ...

    A short video gets a smaller stride, as in sample_clip. No randomness. At stride 0, clip k is
    the frame in the middle of part k of `clips` equal parts.
    """
    if stride == 0:
        return [[(2 * k + 1) * total // (2 * clips)] * frames for k in range(clips)]
    stride = fitting_stride(total, frames, stride)
    places = list(range(0, total, stride))
    places += [places[-1]] * (frames - len(places))
    step = (len(places) - frames) / max(clips - 1, 1)
    return [places[int(k * step) :][:frames] for k in range(clips)]


def uniform_views(total: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """Test clips of TSN sampling (paper: 2): clip k takes floor((i + k/clips) * total/frames).

    i counts the frames of the clip. `stride` plays no part. No randomness.
    """
    return [[int((i + k / clips) * total / frames) for i in range(frames)] for k in range(clips)]


# name -> (rule of a training clip, rule of test clips)
SAMPLING = {"dense": (sample_clip, dense_views), "uniform": (uniform_clip, uniform_views)}


# ------------------------------------------------------------------------------ augmentation


class MultiScaleCrop(v2.Transform):
    """TSN's crop, VideoMAE's only pre-training augmentation: one box per clip, resized to a square.

    Width and height are each 1, .875, .75 or .66 of the short side, at most one step apart. The box
    sits at one of 13 places (corners, edges, centre, quarter points). Sides within 2 pixels of
    `size` become `size`, if the frame has as many (there, crops get black edges otherwise).
    Bilinear with antialiasing, as in the official code.
    """

    SCALES = (1, 0.875, 0.75, 0.66)
    # In quarters of the room that the box leaves: (x, y).
    PLACES = (
        *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2)),
        *((2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)),
    )

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs) -> dict:
        height, width = VF.get_size(flat_inputs[0])
        edges = [int(min(height, width) * scale) for scale in self.SCALES]
        if self.size <= min(height, width):
            edges = [self.size if abs(edge - self.size) < 3 else edge for edge in edges]
        steps = range(len(edges))
        pairs = [(edges[j], edges[i]) for i in steps for j in steps if abs(i - j) <= 1]
        w, h = pairs[int(torch.randint(len(pairs), ()))]
        x, y = self.PLACES[int(torch.randint(len(self.PLACES), ()))]
        left, top = x * ((width - w) // 4), y * ((height - h) // 4)
        return dict(left=left, top=top, width=w, height=h)

    def transform(self, inpt, params):
        return VF.resized_crop(inpt, **params, size=[self.size, self.size], antialias=True)


class OfficialRandAugment(v2.RandAugment):
    """One operation of RandAugment, as the official script's rand-m7-n4-mstd0.5-inc1.

    The magnitude is drawn from N(`mean`, 0.5) each time, cut to 0 .. 10. Unlike torchvision's, it
    has Invert and SolarizeAdd, no Identity, keeps 4 - int(0.4 * magnitude) bits in Posterize, and
    turns, shears and shifts frames with Pillow's bicubic interpolation.
    """

    _AUGMENTATION_SPACE = {
        **v2.RandAugment._AUGMENTATION_SPACE,
        "Invert": (lambda bins, height, width: None, False),
        "Posterize": (lambda bins, height, width: 4 - 4 * torch.arange(bins) // (bins - 1), False),
        "SolarizeAdd": (lambda bins, height, width: torch.linspace(0, 110, bins), False),
    }
    del _AUGMENTATION_SPACE["Identity"]

    def __init__(self, mean: float):
        bicubic = v2.InterpolationMode.BICUBIC
        super().__init__(1, num_magnitude_bins=1001, interpolation=bicubic, fill=128)
        self.mean = mean

    def forward(self, *inputs):
        self.magnitude = round(100 * torch.normal(self.mean, 0.5, ()).clamp(0, 10).item())
        return super().forward(*inputs)

    def _apply_image_or_video_transform(self, image, name, magnitude, **how):
        apply = super()._apply_image_or_video_transform
        if name == "SolarizeAdd":
            return image + int(magnitude) * (image < 128).to(torch.uint8)
        if name not in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
            return apply(image, name, magnitude, **how)
        # torchvision has no bicubic interpolation for these on tensors.
        frames = [apply(VF.to_pil_image(frame), name, magnitude, **how) for frame in image]
        return torch.stack([VF.pil_to_tensor(frame) for frame in frames])


class Erase(v2.RandomErasing):
    """Random erasing of a uint8 video: one rectangle for all frames, with new noise in each frame.

    Its area is 2 to 33 %, its aspect 0.3 to 3.3, the noise has ImageNet's mean and std (official
    code). Pixels are uint8: noise below 0 or above 255 is clipped, unlike there.
    """

    def __init__(self, p: float):
        super().__init__(p, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))

    def transform(self, inpt, params):
        if params["v"] is None:
            return inpt
        i, j, h, w = (params[key] for key in "ijhw")
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        noise = torch.randn(*inpt.shape[:-2], h, w) * std + mean
        return VF.erase(inpt, i, j, h, w, v=(255 * noise).clamp(0, 255).to(torch.uint8))


def pretrain_transform(size: int, flip: bool) -> v2.Transform:
    """Augmentation of pre-training: MultiScaleCrop; with `flip`, half of the clips mirrored."""
    flips = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([MultiScaleCrop(size), *flips])


def finetune_transform(
    size: int, flip: bool, operations: int, magnitude: float, smallest: float, erase: float,
    official: bool = False,
) -> v2.Transform:  # fmt: skip
    """Augmentation of fine-tuning, the same for all frames of a clip (official code, in its order).

    RandAugment (`operations` draws, each applied half of the time, at `magnitude` of 10),
    RandomResizedCrop to size x size pixels from `smallest` to all of the area, mirror image half
    the time with `flip`, random erasing with probability `erase`. RandAugment is torchvision's,
    bilinear, and the crop has antialiasing; with `official` both are as in the official code.
    """
    bilinear = v2.InterpolationMode.BILINEAR
    one = v2.RandAugment(1, round(3 * magnitude), 31, interpolation=bilinear, fill=128)
    one = OfficialRandAugment(magnitude) if official else one
    steps = [v2.RandomApply([one], p=0.5) for _ in range(operations)]
    steps.append(v2.RandomResizedCrop(size, scale=(smallest, 1.0), antialias=not official))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if erase:
        steps.append(Erase(erase))
    return v2.Compose(steps)


def spatial_views(clip: Tensor, size: int, crops: int, antialias: bool = True) -> Tensor:
    """(T, C, H, W) -> (crops, T, C, size, size): short side to `size`, squares along the other."""
    clip = VF.resize(clip, size, antialias=antialias)
    spare = [side - size for side in clip.shape[-2:]]  # one of them is 0
    shares = [k / (crops - 1) for k in range(crops)] if crops > 1 else [0.5]
    corners = [(int(share * spare[0]), int(share * spare[1])) for share in shares]
    return torch.stack([clip[..., y : y + size, x : x + size] for y, x in corners])


# ------------------------------------------------------------------------- data sets, loader


class Videos(Dataset):
    """Training clips of a split. The key is (index, seed): the seed decides all that is random.

    An item is (clips (R, T, C, H, W) uint8, label, unreadable): R clips from one decode, each
    augmented on its own and cut at its own time, or with `same_time` all at one. `transform` may be
    a list, one for each of the R clips. A video that cannot be read is left out and reported,
    {index: error}, and a random other one takes its place. ValueError after 10 of them in a row.
    """

    def __init__(
        self, split: Split, sample: Callable[[int], list[int]], transform, repeats: int = 1,
        same_time: bool = False,
    ):  # fmt: skip
        self.split, self.sample, self.transform = split, sample, transform
        self.repeats, self.same_time = repeats, same_time

    def __len__(self) -> int:
        return len(self.split.paths)

    def pick(self, total: int) -> list[int]:
        """Frames of the R clips, one after the other, from a video of `total` frames."""
        if self.same_time:
            return self.sample(total) * self.repeats
        return [i for _ in range(self.repeats) for i in self.sample(total)]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, dict[int, str]]:
        (index, seed), unreadable = key, {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone
            for _ in range(10):
                try:
                    frames = self.read(index)
                except ValueError as error:
                    unreadable[index] = str(error)
                    index = int(torch.randint(len(self), ()))
                    continue
                return *self.augment(index, frames), unreadable
        raise ValueError(f"10 videos in a row cannot be read: {next(iter(unreadable.values()))}")

    def read(self, index: int) -> Tensor:
        """The frames of video `index` (R * T, C, H, W). ValueError where it cannot be read."""
        return read_frames(self.split.paths[index], self.pick)

    def augment(self, index: int, frames: Tensor) -> tuple[Tensor, int]:
        """Frames of video `index` -> clips (R, T, C, H, W), label."""
        several = isinstance(self.transform, list)
        transforms = self.transform if several else [self.transform] * self.repeats
        pairs = zip(transforms, frames.chunk(self.repeats), strict=True)
        clips = [apply(tv_tensors.Video(clip)).as_subclass(Tensor) for apply, clip in pairs]
        return torch.stack(clips), self.split.labels[index]


def collate(items: list) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Items -> (clips (B*R, T, C, H, W) uint8, labels (B*R,), unreadable).

    The clips of a video stand together.
    """
    clips, labels, parts = zip(*items, strict=True)
    unreadable = {index: error for part in parts for index, error in part.items()}
    # Channels last, as the decoder leaves them, straight into a worker's shared memory: half of
    # the copies.
    rows = default_collate([clip.movedim(2, -1) for clip in clips])
    labels = torch.tensor(labels).repeat_interleave(rows.shape[1])
    return rows.flatten(0, 1).movedim(-1, 2), labels, unreadable


TIMEOUT = 900  # seconds that a batch may take: decoders and network disks can hang


def make_loader(
    dataset: Dataset, batches: Iterable, workers: int, pin: bool = False, collate=collate
) -> Iterator:
    """Yield the batches, decoded by `workers` processes (0: in this one).

    `batches` holds the keys of each batch. `collate` makes a batch of its items (itemgetter(0): one
    item is a batch). `pin` memory for copies to a GPU. Raises ValueError, in one line, for a worker
    that dies or gives nothing for TIMEOUT seconds; a ValueError in a worker comes out as it is.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        timeout=TIMEOUT if workers else 0,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else it draws from the global one
    )
    if not workers:
        yield from loader
        return
    gc.collect()  # in a worker, decoders that are garbage here would wait for threads left here
    iterator = iter(loader)
    # An error elsewhere keeps this generator alive to the end of the program.
    atexit.register(iterator._shutdown_workers)
    try:
        for process in iterator._workers:
            # torch ends workers that are stuck by SIGTERM, which these ignore: use SIGKILL.
            process._popen.terminate = process._popen.kill
        yield from iterator
    except ValueError as error:  # of a file: without the traceback of the worker
        raise ValueError(str(error).rstrip().rpartition("ValueError: ")[2]) from error
    except (RuntimeError, EOFError, ConnectionError) as error:
        if str(error).startswith("Caught"):  # the worker lives
            raise
        raise ValueError(
            f"a loader worker died or hangs ({str(error).strip()}): out of memory (fewer "
            "--workers), /dev/shm full, or a file that crashes the decoder (`python data.py check` "
            "finds it); then continue with --resume"
        ) from error
    finally:
        iterator._shutdown_workers()  # now, not when Python gets round to it
        atexit.unregister(iterator._shutdown_workers)


def _begin_worker(worker: int) -> None:
    # What to do about a signal that asks a run to stop is up to the main process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    from lib import engine, prepare

    engine.cli(prepare.main)
