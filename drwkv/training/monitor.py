"""What a person sees of a run: metrics.jsonl, TensorBoard, a progress bar, log.txt, sample grids, and the audit.

Numbers are read from the device one step late, so that the loop never waits for the step that it has just launched.
After a resume all of it is cut back to the step that training goes on from.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import google_crc32c
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from drwkv.files import write_whole
from drwkv.parallel.distributed import World
from drwkv.sampling import SamplerConfig
from drwkv.training.goodput import Goodput
from drwkv.training.speed import Speed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("drwkv")
NO_MFU = Speed()
GRIDS = "grids"  # folder of the run's grids of samples


@dataclass
class MonitorConfig:
    """What is shown, and how often."""

    tensorboard_every_steps: int = 10  # steps between scalars in TensorBoard; 0: no TensorBoard
    grid_every_steps: int = 0  # steps between grids of samples from the EMA; 0: none
    grid_columns: int = 8  # samples of each class in a grid (of all, without classes)
    grid_sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(name="ddim", steps=20))
    # Folder or hub name of the VAE that decodes grids of latents; None: they are pixels
    vae: str | None = None
    progress: bool = True  # progress bar on stderr of rank 0
    ranks_every_steps: int = 50  # steps between looks at all ranks for one that is slow; 0: none
    peak_tflops: float | None = None  # matmul TFLOP/s of one rank, for the MFU; None: measured; 0: no MFU


@dataclass(frozen=True)
class StepRecord:
    """One step: numbers known on the host, and 0-dim tensors still on the device."""

    step: int  # 0 is the first
    n: int  # first sample of the batch
    num_samples: int  # samples of the batch
    lr: float
    loss: torch.Tensor  # mean over the global batch
    grad_norm: torch.Tensor  # global, before clipping
    found_inf: torch.Tensor  # 1 where the step was left out


def every(step: int, interval: int) -> bool:
    """Whether something due every `interval` steps is due after `step` steps; 0 means never."""
    return interval > 0 and step > 0 and step % interval == 0


class Monitor:
    """Writes what rank 0 shows; on the other ranks it only keeps the records moving."""

    def __init__(
        self, folder: Path, config: MonitorConfig, world: World, *, total_steps: int, step: int,
        on_record: Sequence[Callable[[StepRecord, float, bool], None]], speed: Speed = NO_MFU,
    ) -> None:  # fmt: skip
        self._folder, self._config, self._world, self._on_record = folder, config, world, on_record
        self._total_steps, self._speed = total_steps, speed
        # A record, what waits for its numbers, and the seconds that its step took.
        self._pending: tuple[StepRecord, Callable[[], list[float]], float] | None = None
        self._metrics: TextIO | None = None
        self._writer: SummaryWriter | None = None
        self._bar: tqdm | None = None
        self._goodput: Goodput | None = None
        self._beside: dict[str, float] = {}
        self._open(step)

    def _open(self, step: int) -> None:
        self._last_time = time.perf_counter()
        if not self._world.is_first:
            return
        cut_back(self._folder / "metrics.jsonl", step)
        self._goodput = Goodput(
            read_lines(self._folder / "starts.jsonl"), read_lines(self._folder / "metrics.jsonl")
        )
        self._metrics = (self._folder / "metrics.jsonl").open("a")
        self._bar = tqdm(
            total=self._total_steps,
            initial=step,
            unit="step",
            disable=not self._config.progress,
            mininterval=0.5,
        )
        if self._config.tensorboard_every_steps:
            # Its import takes half a second, and ranks that show nothing need not wait for it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)
        self._begin_grids(step)

    def _begin_grids(self, step: int) -> None:
        """Remove the grids of steps that will come again; that of `step` holds, and TensorBoard has dropped it."""
        for path in sorted((self._folder / GRIDS).glob("step_*.png")):
            drawn_after = int(path.stem.removeprefix("step_"))
            if drawn_after > step:
                path.unlink()
            elif drawn_after == step:
                self._show_image(step, np.asarray(Image.open(path)))

    def rewind(self, step: int) -> None:
        """Go on from `step`, earlier than where the run stood: cut back what is shown."""
        self.close()
        self._open(step)

    def record(self, record: StepRecord) -> None:
        """Take one step's record, and write the one before; on a GPU this step may have only been launched."""
        numbers = _on_their_way(record)
        self.flush()
        now = time.perf_counter()
        self._pending, self._last_time = (record, numbers, now - self._last_time), now

    def flush(self) -> None:
        """Write the record that waits, if any; waits for its step on the device."""
        if self._pending is None:
            return
        (record, numbers_of, seconds), self._pending = self._pending, None
        loss, norm, found_inf = numbers_of()
        for listener in self._on_record:
            listener(record, loss, bool(found_inf))
        if self._metrics is None or self._bar is None or self._goodput is None:
            return
        if not found_inf:
            self._goodput.add(seconds)
        speed = self._speed.numbers(record.num_samples, seconds)
        numbers = {"loss": loss, "grad_norm": norm, "lr": record.lr, **speed}
        beside, self._beside = self._beside, {}
        line = {
            "step": record.step,
            "n": record.n,
            "num_samples": record.num_samples,
            "skipped": bool(found_inf),
        }
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._metrics.write(json.dumps({**line, **finite, **beside, "seconds": seconds}) + "\n")
        self._metrics.flush()
        mfu = f", MFU {speed['mfu']:.2f}" if "mfu" in speed else ""
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, {speed['images_per_sec']:.0f} images/s{mfu}", refresh=False
        )
        self._bar.update(record.step + 1 - self._bar.n)
        if self._writer is not None and every(record.step + 1, self._config.tensorboard_every_steps):
            for name, value in {**numbers, "goodput": self._goodput.share()}.items():
                self._writer.add_scalar(f"train/{name}", value, record.step)

    def left_out(self, step: int, n: int, num_samples: int) -> None:
        """Write the line of a batch that was left out without being looked at."""
        self.flush()
        if self._metrics is not None:
            line = {"step": step, "n": n, "num_samples": num_samples, "skipped": True}
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show numbers, by name, measured after `step` steps."""
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def beside(self, numbers: dict[str, float]) -> None:
        """Write these numbers beside those of the step whose record waits."""
        self._beside |= numbers
        if self._writer is not None and self._pending is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(f"ranks/{name}", value, self._pending[0].step)

    def grid(self, step: int, image_HWC: np.ndarray) -> None:
        """Show a grid of samples, uint8 (H, W, C), drawn after `step` steps, and keep it as a PNG file."""
        if not self._world.is_first:
            return
        content = io.BytesIO()
        Image.fromarray(image_HWC).save(content, format="png")
        write_whole(self._folder / GRIDS / f"step_{step:08d}.png", content.getvalue())
        self._show_image(step, image_HWC)

    def _show_image(self, step: int, image_HWC: np.ndarray) -> None:
        if self._writer is not None:
            self._writer.add_image("samples/ema", image_HWC, step, dataformats="HWC")
            self._writer.flush()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside (a grid, a save) belongs to no step's time. The step that has begun ends before."""
        self.flush()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._last_time += time.perf_counter() - begin

    def tell_goodput(self) -> None:
        """Log what share of the time since the run's first start its steps took."""
        if self._goodput is not None:
            log.info("%s", self._goodput.words())

    def close(self) -> None:
        """Write what waits and close every file."""
        self.flush()
        for part in (self._metrics, self._writer, self._bar):
            if part is not None:
                part.close()


def _on_their_way(record: StepRecord) -> Callable[[], list[float]]:
    """Have the numbers of a step copied to the host as soon as the device has them; the result waits for no later step.

    Asked of the device later, they would come behind the step that has been launched meanwhile.
    """
    numbers = torch.stack([record.loss, record.grad_norm, record.found_inf])
    if not numbers.is_cuda:
        return numbers.tolist
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    here.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return list(here.tolist())

    return read


class Audit:
    """One line for each sample that this rank trains on: step, n, sample id, crc32c of x_t's bytes."""

    def __init__(self, folder: Path, world: World, *, enabled: bool, step: int) -> None:
        self._folder, self._world = folder, world
        self._file: TextIO | None = None
        if enabled:
            self._open(step)

    def _open(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._world.is_first:
            for path in self._folder.glob("rank_*.jsonl"):
                cut_back(path, step)
        self._world.barrier()
        self._file = (self._folder / f"rank_{self._world.rank:05d}.jsonl").open("a")

    def write(self, step: int, n: torch.Tensor, sample_id: torch.Tensor, x_t: torch.Tensor) -> None:
        """Write the samples of one micro-batch: n (B,), sample_id (B,), x_t (B, C, H, W)."""
        if self._file is None:
            return
        for one_n, one_id, one in zip(n.tolist(), sample_id.tolist(), x_t.detach().cpu(), strict=True):
            digest = google_crc32c.value(one.contiguous().numpy().tobytes())
            self._file.write(
                json.dumps({"step": step, "n": one_n, "id": one_id, "x_t": f"{digest:08x}"}) + "\n"
            )
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Go on from `step`: cut back every rank's lines. Collective."""
        if self._file is not None:
            self.close()
            self._open(step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                if line.endswith("\n"):
                    yield json.loads(line)
            except json.JSONDecodeError:  # a machine went down while it was written
                log.warning("%s: line %d cannot be read and is left out: %.80r", path, number, line)


def cut_back(path: Path, step: int) -> None:
    """Keep the records of steps before `step` alone, so that what is done again is not written twice."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in read_lines(path) if record["step"] < step)
    temporary.replace(path)


@contextmanager
def logging_to(folder: Path, world: World) -> Iterator[None]:
    """Log in words: rank 0 to `folder/log.txt` and stderr, the others only errors, with their rank."""
    handlers: list[logging.Handler] = []
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        handlers = [logging.FileHandler(folder / "log.txt"), logging.StreamHandler()]
        style = "%(asctime)s %(message)s"
    else:
        handlers = [logging.StreamHandler()]
        handlers[0].setLevel(logging.ERROR)
        style = f"rank {world.rank}: %(message)s"
    for handler in handlers:
        handler.setFormatter(logging.Formatter(style))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
