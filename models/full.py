"""`full` training: the backbone trains too, from pretrained or from random weights, under any objective.

Letters in shapes: N images, V views, B batch of this process, G global batch, C colours, S pixels a side,
F features of the backbone.
"""

import errno
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from models import allocator, backbones, checkpoint, distributed, features, networks, optimisers, space, views
from models.checkpoint import Checkpoint
from models.config import InputError
from models.fit import seed_of
from models.graphs import Recorder
from models.limits import check_below_one, check_not_negative, check_positive
from models.objective import Objective, ObjectiveFactory
from models.progress import Step

log = logging.getLogger(__name__)

# Between yields inside of an epoch, and between questions to `stop`.
REPORT_EVERY_S = 2.0
ENCODE_BATCH = 256
PIECE_PIXELS = 16 * 224**2  # as many images at once, where a batch may be computed in pieces


class Stopped(Exception):
    """Asked to stop: the state is in the checkpoint, where there is a folder for it."""


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Settings of the engine, whatever the objective."""

    batch: int | None = None  # images a step over all processes; None: 256, and 64 above 64 pixels
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3  # of heads, and of a backbone with random weights
    pretrained_learning_rate: float = 1e-4  # of a backbone that knows something already
    weight_decay: float = 1e-4  # of matrices and filters
    warmup: float = 0.1  # share of the steps in which the rate rises; it falls as a cosine after
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # of the backbone; auto: what the device does faster

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "pretrained_learning_rate")
        for name, choices in (("optimizer", ("adamw", "sgd")), ("precision", ("auto", "bfloat16", "float32"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(choices)}")
        if self.batch is not None and self.batch < 2:
            raise ValueError(f"batch is {self.batch}; it must be at least 2")
        check_not_negative(self, "weight_decay")
        check_below_one(self, "warmup")


class Training:
    """A backbone and an objective on their way through the epochs; `run` may be called again after a kill.

    Args:
        pixels_NSSC: uint8, of every image; may be a memory map.
        objective: its class, or a function that makes it.
        backbone: see `networks.network`.
        weights: see `networks.network`.
        clusters: how many groups.
        epochs: passes over the collection.
        seed: of the weights, the order and the views; same seed, same bits on the same CPU.
        device: "cpu", "cuda" or "cuda:1".
        config: settings of the engine.
        checkpoint_dir: where to keep the state, and to look for one to go on from; None keeps none.
        replace: begin anew where another run's checkpoint lies; else that is refused.
        checkpoint_every_s: seconds between checkpoints.
        images_digest: names the images in the checkpoint; by default SHA-256 of the pixels.
        stop: asked after every step; once true, the state is saved and `Stopped` raised.

    Raises:
        InputError: weights that do not fit, fewer images than processes, another run's checkpoint.

    """

    def __init__(
        self,
        pixels_NSSC: np.ndarray,
        *,
        objective: ObjectiveFactory,
        backbone: str,
        weights: str | None,
        clusters: int,
        epochs: int,
        seed: int,
        device: str = "cpu",
        config: FullConfig | None = None,
        checkpoint_dir: Path | None = None,
        replace: bool = False,
        checkpoint_every_s: float = 30.0,
        images_digest: str | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.pixels_NSSC, self.epochs, self.seed, self.device = pixels_NSSC, epochs, seed, device
        self.config = config or FullConfig()
        self.checkpoint_dir, self.checkpoint_every_s, self.replace = checkpoint_dir, checkpoint_every_s, replace
        self.stop = stop or (lambda: False)
        images, size = pixels_NSSC.shape[:2]
        if images < 2 * distributed.world_size():
            raise InputError(f"{images} images are too few to train on in {distributed.world_size()} processes")
        # The views' draws; all others are from torch's global generators, in `own_random`.
        self.generator = torch.Generator().manual_seed(seed_of(seed, 1))
        self.random: dict[str, Tensor] = {}
        with self.own_random():
            torch.manual_seed(seed_of(seed, 0))
            network = networks.network(backbone, weights=weights, image_size=size)
            self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's
            made = objective(feature_size=network.feature_size, images=images, clusters=clusters, epochs=epochs)
            self.objective: Objective = made.to(device)
        networks.freeze(self.network, trained_share=made.trained_share)
        self.replica = distributed.replicated(self.network, device=device)
        self.augmentations = [views.augmentation(name, image_size=size) for name in made.view_strengths]
        self.precision = precision(self.config.precision, device, network, image_size=size)
        self.batch = self.config.batch or (256 if size <= networks.SMALL_IMAGE else 64)
        self.steps = max(1, round(images / self.batch))  # of an epoch
        # A CPU is no faster with more at once and needs the memory; several processes would wait for each other.
        in_pieces = made.separable and not made.own_statistics and device == "cpu" and distributed.world_size() == 1
        self.piece = max(1, PIECE_PIXELS // size**2) if in_pieces else None
        self.total = self.steps * epochs
        self.done = 0  # steps
        # Several processes talk to each other within a step, and only AdamW takes its rate from memory.
        recorded = device.startswith("cuda") and distributed.world_size() == 1 and self.config.optimizer == "adamw"
        self.recorder = Recorder() if recorded else None
        self.optimizer = optimisers.optimiser(
            (
                (
                    self.network,
                    self.config.learning_rate if weights == "random" else self.config.pretrained_learning_rate,
                ),
                (self.objective, self.config.learning_rate),
            ),
            kind=self.config.optimizer,
            weight_decay=self.config.weight_decay,
            recorded_on=device if recorded else None,
        )
        about_objective = getattr(made, "config", None)
        self.identity = {
            "objective": f"{type(made).__module__}.{type(made).__qualname__}",
            "objective_config": asdict(about_objective) if is_dataclass(about_objective) else None,  # type: ignore[arg-type]
            "engine": {**asdict(self.config), "batch": self.batch, "precision": str(self.precision)},
            "backbone": backbone,
            "weights": networks.digest(backbone, weights),
            "pooling": networks.POOLING,
            "image_size": size,
            "clusters": clusters,
            "epochs": epochs,
            "seed": seed,
            "images": images_digest or sha256(np.ascontiguousarray(pixels_NSSC).data).hexdigest(),
        }

    def run(self) -> Generator[Step, None, None]:
        """Go through the epochs, from the checkpoint where there is one.

        Raises:
            Stopped: `stop` said so.
            InputError: the loss is no longer a number.

        """
        self.resume()
        with allocator.freed_memory_kept():
            yield from self.epochs_left()

    def epochs_left(self) -> Generator[Step, None, None]:
        saved_s = reported_s = time.monotonic()
        yield Step(done=self.done, total=self.total)
        while self.done < self.total:
            epoch, first = divmod(self.done, self.steps)
            if first == 0:
                self.begin_epoch(epoch)
            sums: dict[str, Tensor] = {}
            for number, (rows_G, pixels_BSSC) in enumerate(self.batches(epoch, first), start=1):
                with self.own_random():
                    details = self.step(rows_G, pixels_BSSC)
                for name, value in details.items():
                    sums[name] = sums[name] + value if name in sums else value
                self.done += 1
                now_s = time.monotonic()
                stopping = distributed.anywhere(self.stop(), device=self.device)
                saving = stopping or self.done == self.total or now_s - saved_s >= self.checkpoint_every_s
                reporting = self.done % self.steps == 0 or now_s - reported_s >= REPORT_EVERY_S
                if saving or reporting:  # a single process waits for its GPU only now
                    means = {name: value.item() / number for name, value in sums.items()}
                    if not math.isfinite(means["loss"]):
                        raise InputError(
                            f"the training left the numbers by step {self.done}: the loss is {means['loss']}"
                        )
                if saving:
                    self.try_to_save()
                    saved_s = now_s
                if stopping:
                    raise Stopped(f"stopped after {self.done} of {self.total} steps")
                if reporting:
                    reported_s = now_s
                    yield Step(done=self.done, total=self.total, details={"epoch": epoch + 1.0, **means})

    def begin_epoch(self, epoch: int) -> None:
        distributed.broadcast(self.objective)
        self.objective.train()
        with self.own_random():
            self.objective.begin_epoch(epoch)

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Inside, torch's global generators are this training's; outside they are as if nothing was drawn here."""
        cuda = self.device.startswith("cuda")
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            if self.random:
                torch.set_rng_state(self.random["cpu"])
            if "cuda" in self.random:
                torch.cuda.set_rng_state(self.random["cuda"], self.device)
            yield
            self.random["cpu"] = torch.get_rng_state()
            if cuda:
                self.random["cuda"] = torch.cuda.get_rng_state(self.device)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of every step from `first` on: rows of the global batch, pixels of this process's share."""
        world, rank = distributed.world_size(), distributed.rank()
        order = torch.randperm(
            len(self.pixels_NSSC), generator=torch.Generator().manual_seed(seed_of(self.seed, 2 + epoch))
        )
        # Shares are of one size: up to `world - 1` images of a batch sit this epoch out.
        rows = [rows_G[: len(rows_G) // world * world] for rows_G in order.tensor_split(self.steps)][first:]

        def fetch(rows_G: Tensor) -> Tensor:
            # By numpy: a second thread that uses torch's pool would get a second pool.
            pixels_BSSC = torch.from_numpy(self.pixels_NSSC[rows_G.chunk(world)[rank].numpy()])
            return pixels_BSSC.pin_memory() if self.device.startswith("cuda") else pixels_BSSC

        with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
            ahead = pool.submit(fetch, rows[0])
            for number, rows_G in enumerate(rows):
                ready = ahead.result()
                if number + 1 < len(rows):
                    ahead = pool.submit(fetch, rows[number + 1])
                yield rows_G.to(self.device, non_blocking=True), ready.to(self.device, non_blocking=True)

    def step(self, rows_G: Tensor, pixels_BSSC: Tensor) -> dict[str, Tensor]:
        """One step of the optimiser on this batch; nothing in it waits for a GPU."""
        optimisers.set_rate(self.optimizer, self.done, total=self.total, warmup=self.config.warmup)
        choices = self.choices(len(pixels_BSSC))
        phase = self.objective.phase()
        if self.recorder is not None and phase is not None:
            return self.recorder(self.learn, phase, rows_G, pixels_BSSC, choices)
        return self.learn(rows_G, pixels_BSSC, [choice.to(self.device) for choice in choices])

    def choices(self, share: int) -> list[views.Draw]:
        """How to make the views of as many images, which are this process's share."""
        world, rank = distributed.world_size(), distributed.rank()
        # Drawn for the global batch, so that the number of processes changes nothing.
        drawn = [views.draw(augmentation, share * world, self.generator) for augmentation in self.augmentations]
        return [each[slice(rank * share, (rank + 1) * share)] for each in drawn]

    def learn(self, rows_G: Tensor, pixels_BSSC: Tensor, choices: Sequence[views.Draw]) -> dict[str, Tensor]:
        """What of a step a GPU does: views, network, loss, optimiser, memory."""
        self.optimizer.zero_grad()
        if self.piece is None:
            details = self.gradients(rows_G, pixels_BSSC, choices)
        else:
            details = self.gradients_in_pieces(rows_G, pixels_BSSC, choices, self.piece)
        distributed.average_gradients(self.objective.parameters())
        self.optimizer.step()
        self.objective.end_step()
        return details

    def gradients(
        self, rows_G: Tensor, pixels_BSSC: Tensor, choices: Sequence[views.Draw], *, share: float = 1.0
    ) -> dict[str, Tensor]:
        """Add those of this batch, which counts as `share` of a whole one; its loss and what else is worth showing."""
        h_VBF = self.forward(self.views(pixels_BSSC, choices))
        loss, details = self.objective.loss(distributed.gather(h_VBF), rows_G)
        (loss * share).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return {"loss": loss.detach(), **details}

    def gradients_in_pieces(
        self, rows_B: Tensor, pixels_BSSC: Tensor, choices: Sequence[views.Draw], piece: int
    ) -> dict[str, Tensor]:
        """The same of a batch whose images have nothing to do with each other, some at a time."""
        sums: dict[str, Tensor] = {}
        for some in space.blocks(len(rows_B), piece):
            share = len(rows_B[some]) / len(rows_B)
            own = self.gradients(rows_B[some], pixels_BSSC[some], [each[some] for each in choices], share=share)
            sums = {name: sums.get(name, 0) + value * share for name, value in own.items()}
        return sums

    def views(self, pixels_BSSC: Tensor, choices: Sequence[views.Draw]) -> Tensor:
        """All views of this process's share, one view after the other; shape (VB, C, S, S)."""
        mean, std = self.network.mean, self.network.std
        return torch.cat([views.view(pixels_BSSC, each, mean=mean, std=std) for each in choices])

    def forward(self, x_XCSS: Tensor) -> Tensor:
        """Features of views that lie one after the other, float32 of shape (V, B, F)."""
        self.replica.train(self.objective.own_statistics)
        with self.autocast():
            h_XF: Tensor = self.replica(x_XCSS)
        h_XF = h_XF.to(torch.promote_types(h_XF.dtype, torch.float32))
        return h_XF.view(len(self.augmentations), -1, h_XF.shape[1])

    def autocast(self) -> torch.autocast:
        half = self.precision == torch.bfloat16
        return torch.autocast(self.device.split(":", maxsplit=1)[0], dtype=torch.bfloat16, enabled=half)

    @torch.no_grad()
    def features(self) -> Generator[Step, None, np.ndarray]:
        """Features of every image as it is, float32 of shape (N, F), on every process.

        Raises:
            Stopped: `stop` said so; nothing is lost after the last step, whose state is in the checkpoint.

        """
        self.network.eval()
        own_R = torch.arange(len(self.pixels_NSSC)).tensor_split(distributed.world_size())[distributed.rank()]
        parts, done = [], 0
        with allocator.freed_memory_kept():
            for features_BF in self.encoded(own_R.tolist()):
                parts.append(features_BF)
                done += len(features_BF)
                yield Step(done=done, total=len(own_R))
        return distributed.concatenate(torch.cat(parts), rows=len(self.pixels_NSSC)).cpu().numpy()

    def encoded(self, rows_R: list[int]) -> Iterator[Tensor]:
        """Features of these images, some at a time."""
        threads, size = torch.get_num_threads(), self.pixels_NSSC.shape[1]
        fast = backbones.fast_encoder(self.network, image_size=size, threads=threads, device=self.device)
        if fast is None:
            for some in space.blocks(len(rows_R), ENCODE_BATCH):
                yield self.encode(self.own_pixels(rows_R[some]))
        else:
            batches = features.by_threads(lambda rows_B: fast(self.own_pixels(rows_B)), rows_R, threads=threads)
            yield from (torch.from_numpy(features_BF) for _, features_BF in batches)

    def own_pixels(self, rows_B: Sequence[int]) -> np.ndarray:
        if self.stop():
            raise Stopped("stopped while the images were encoded")
        pixels_BSSC: np.ndarray = self.pixels_NSSC[rows_B]
        return pixels_BSSC

    def encode(self, pixels_BSSC: np.ndarray) -> Tensor:
        host = torch.from_numpy(pixels_BSSC)
        x_BCSS = views.plain(host.to(self.device), mean=self.network.mean, std=self.network.std)
        with self.autocast():
            h_BF: Tensor = self.network(x_BCSS)
        return h_BF.float()

    def try_to_save(self) -> None:
        """Save where there is room; a training does not end for the want of a checkpoint."""
        try:
            self.save()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning("no room for a checkpoint; the training goes on, and tries again later")

    def save(self) -> None:
        """Write the checkpoint, where this is the process to do it."""
        if self.checkpoint_dir is None or distributed.rank() != 0:
            return
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"objective.{name}": value for name, value in self.objective.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimisers.state(self.optimizer).items()}
        tensors["random.views"] = self.generator.get_state()
        tensors |= {f"random.{name}": value for name, value in self.random.items()}
        checkpoint.save(
            self.checkpoint_dir, Checkpoint(run=self.identity, position={"done": self.done}, tensors=tensors)
        )

    def resume(self) -> None:
        """Go back to the state of the checkpoint, where there is one."""
        if self.checkpoint_dir is None:
            return
        try:
            found = checkpoint.load(self.checkpoint_dir, run=self.identity)
        except checkpoint.OtherRun as error:
            if not self.replace:
                raise
            log.warning("%s; the training begins anew", error)
            return
        if found is None:
            return
        self.done = found.position["done"]
        if self.done % self.steps:
            self.begin_epoch(self.done // self.steps)
        self.network.load_state_dict(part(found.tensors, "network."))
        self.objective.load_state_dict(part(found.tensors, "objective."))
        optimisers.restore(self.optimizer, part(found.tensors, "optimizer."))
        if self.recorder is not None:
            self.recorder = Recorder()  # the optimiser's state lies elsewhere now
        self.generator.set_state(found.tensors["random.views"])
        # What a CPU has saved may go on on a GPU, whose generator it knows nothing of.
        self.random = {name: found.tensors.get(f"random.{name}", state) for name, state in self.random.items()}


def precision(wanted: str, device: str, network: nn.Module, *, image_size: int) -> torch.dtype:
    """The faster one, bfloat16 or float32.

    On a core with AVX-512 BF16, forward and backward in bfloat16 gave 737 images/s for 330 (ResNet-10, 32 pixels,
    channels last) and 108 for 60 (ResNet-18), but 198 for 429 with the grouped convolutions of EfficientNet-Lite at
    32 pixels. At 224, with the last third of its layers training, both cores gave 40 for 26.
    """
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    grouped = any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in network.modules())
    slow = grouped and image_size <= networks.SMALL_IMAGE
    fast = torch.cpu._is_avx512_bf16_supported() and not slow  # noqa: SLF001  # torch has no public name for it
    return torch.bfloat16 if fast else torch.float32


def part(tensors: Any, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
