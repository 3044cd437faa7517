"""One training loop for every stage: Ultralytics' DetectionTrainer with our data, our hooks and an exact resume.

`YOLO.train` rebuilds a model from its yaml, and copies the tensors that fit. This silently undoes pruning. So the trainer gets the
module itself. The generators are seeded from (seed, epoch) at each epoch. A killed run continues from `resume.pt`, which has the
float32 model, EMA, optimizer, scaler and hooks. On a CPU without workers, its result equals the result of an uninterrupted run, bit
for bit.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import ModelEMA, unwrap_model

from yolo_compress import progress, ranks
from yolo_compress.data.dataset import Dataset, Sample
from yolo_compress.errors import CorruptArtifact, EnvironmentLacks, NumericsError, RecipeError
from yolo_compress.files.atomic import atomic_write
from yolo_compress.files.csv_text import csv_text
from yolo_compress.nets import detect
from yolo_compress.runtime.measure.device import usable_cpus
from yolo_compress.store.resources import PREFETCHED, SHARED_MEMORY
from yolo_compress.train import together
from yolo_compress.train.checkpoint import check_finite, contiguous, widths
from yolo_compress.train.dataset import EpochSampler, PreflightDataset, seed_everything
from yolo_compress.train.hook import Batch, TrainHook
from yolo_compress.train.settings import TrainSettings
from yolo_compress.train.together import Training

MAX_GRADIENT_NORM = 10.0  # Ultralytics' own clip
LISTED_IMAGES = 3  # images of a bad batch in the message; the file `BAD_BATCH` lists all
BAD_BATCH = "bad_batch.txt"
WORKER_PATIENCE_S = 600  # timeout of a data worker for one batch
# Messages of allocators, cuBLAS and cuDNN if memory does not suffice. Ultralytics checks for the same ones.
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_internal_error",
    "unable to find an engine",
)
# Ultralytics halves the batch up to 3 times if memory does not suffice. The count starts at 3, so that it never does.
RETRIES = 3
# Time constants of BatchNorm's running average in a run, at least. exp(-3) = 5 % of the old statistics are left.
AVERAGES = 3


def train(
    model: nn.Module,
    dataset: Dataset,
    settings: TrainSettings,
    hooks: Sequence[TrainHook],
    work: Path,
    what: str,
) -> nn.Module:
    """Train `model` and return its EMA: a float32 module of Ultralytics' own classes, on the CPU, in evaluation mode.

    Args:
        model: Stock Ultralytics detector, changed in place. Its widths do not change.
        dataset: Images and labels that passed the preflight.
        settings: Schedule, augmentation and machine.
        hooks: Called in this order, as the docstring of `TrainHook` describes.
        work: Folder for `resume.pt` and `results.csv`. Training continues from a `resume.pt` in it.
        what: Name of the run in progress lines.

    Raises:
        NumericsError: The loss or a weight is NaN or infinite. `resume.pt` has the last good epoch.
        CorruptArtifact: `resume.pt` does not fit this run.
        EnvironmentLacks: The device does not exist or has too little memory, or a data worker was killed or hangs.
    """
    before = widths(model)
    if settings.epochs == 0:
        return _untrained(model, hooks, settings)
    training = Training(model, dataset, settings, hooks, work, what)
    _check_one_device(settings)
    together.share(training)
    ema = _run(training)
    for hook in reversed(hooks):
        hook.to_stock(ema)
    ema = contiguous(ema.cpu().float().eval())
    if widths(ema) != before:
        raise AssertionError(f"{what}: training changed the widths of the model")
    check_finite(ema, what)
    return ema


def take_part(device: str, workers: int | None, threads: int | None) -> Any:
    """On a rank other than 0, take part in all trainings of rank 0, with the device of this machine.

    Returns:
        The result that rank 0 passed to `together.end`.
    """

    def join(training: Training) -> None:
        here = replace(training.settings, device=device, workers=workers, threads=threads)
        _run(replace(training, settings=here))

    return together.follow(join)


def _check_one_device(settings: TrainSettings) -> None:
    """Check that one process does not train on several devices.

    Ultralytics would remove the work folder and start processes without our data and hooks.

    Raises:
        RecipeError: There are several devices but only one process.
    """
    if "," in settings.device and not ranks.several():
        raise RecipeError(
            f"run.device={settings.device}: one process trains on one GPU; the command line starts a process for each GPU, "
            "start a program of your own with torchrun"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _run(training: Training) -> nn.Module:
    """Run the training loop and return the EMA of the model. The EMA still has the modules that hooks inserted."""
    hooks, settings, what = training.hooks, training.settings, training.what
    trainer = HookedTrainer(training.model, training.dataset, settings, hooks, training.work, what)
    try:
        trainer.train()
    except RuntimeError as error:
        if _out_of_memory(error):
            raise EnvironmentLacks(
                f"{what}: out of memory at batch {settings.batch} and imgsz {settings.imgsz_px}: lower "
                f"{what.split()[0]}.batch or data.imgsz; the same command continues ({_first_line(error)})"
            ) from error
        if "DataLoader" not in str(error):
            raise
        raise EnvironmentLacks(
            f"{what}: a data worker ended or hangs ({_first_line(error)}): give more memory, more room in "
            f"{SHARED_MEMORY}, or a lower run.workers (0: no workers); the same command continues"
        ) from error
    finally:
        trainer.close()
        for hook in hooks:
            hook.on_end(unwrap_model(trainer.model))
    return trainer.ema.ema  # type: ignore[no-any-return]


def _untrained(model: nn.Module, hooks: Sequence[TrainHook], settings: TrainSettings) -> nn.Module:
    """Return the model after its hooks ran without training: `on_model`, `on_end` and `to_stock`. PTQ is QAT with 0 epochs."""
    model = model.to("cpu" if settings.device == "cpu" else f"cuda:{settings.device.split(',')[0]}").eval()
    for hook in hooks:
        hook.on_model(model)
    for hook in reversed(hooks):
        hook.on_end(model)
        hook.to_stock(model)
    return model.cpu().float().eval()


def _out_of_memory(error: RuntimeError) -> bool:
    """Return whether the cause of an error is too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in NO_MEMORY)


class HookedTrainer(DetectionTrainer):
    """Ultralytics' DetectionTrainer, changed to train the given module. It calls hooks, saves atomically and resumes exactly.

    It reads the images and labels that passed the preflight.
    """

    def __init__(
        self,
        module: nn.Module,
        dataset: Dataset,
        settings: TrainSettings,
        hooks: Sequence[TrainHook],
        work: Path,
        what: str,
    ) -> None:
        self.hooks = list(hooks)
        self.dataset = dataset
        self.settings = settings
        self.work = work
        self.what = what
        self.rows: list[dict[str, float]] = []
        self._saved: dict[str, Any] | None = None  # the content of `resume_file` when training started
        self.hook_rows: dict[str, float] = {}
        self._bars: list[Any] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        _check_one_device(settings)
        folder = work
        if ranks.rank() > 0:  # Ultralytics creates and removes files there; only rank 0 uses the folder of the run
            self._scratch = tempfile.TemporaryDirectory()
            folder = Path(self._scratch.name)
        try:
            super().__init__(overrides=settings.overrides(folder) | {"device": ranks.own_device(settings.device)})
        except ValueError as error:  # Ultralytics raises it for a missing CUDA device
            if "CUDA" in str(error) or "device" in str(error):
                raise EnvironmentLacks(f"run.device={settings.device}: {str(error).strip().splitlines()[0]}") from error
            raise
        if self.device.type == "cpu":  # Ultralytics leaves one core idle
            torch.set_num_threads(settings.threads or max(1, usable_cpus() // ranks.local_world()))
            if settings.workers:
                progress.say(
                    f"run.workers={settings.workers} has no effect on a CPU: the training process loads the images"
                )
        if ranks.several():
            self.world_size = ranks.world()
        self.model = module
        for event in ("on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_fit_epoch_end"):
            self.add_callback(event, getattr(type(self), f"_{event}"))

    # --- data -------------------------------------------------------------------------------------------------------

    def get_dataset(self) -> dict[str, object]:
        names = dict(enumerate(self.dataset.names))
        return {"train": "train", "val": "val", "names": names, "nc": len(names), "channels": self.dataset.channels}

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> PreflightDataset:
        samples: Sequence[Sample] = self.dataset.train if img_path == "train" else self.dataset.val
        training = mode == "train"
        return PreflightDataset(
            samples,
            cache=training,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=training,
            hyp=self.args,
            rect=not training,
            stride=self.stride,
            pad=0.0 if training else 0.5,
            data=self.data,
        )

    def get_dataloader(
        self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train"
    ) -> InfiniteDataLoader:
        if mode != "train":
            return _with_timeout(super().get_dataloader(dataset_path, batch_size, rank, mode))
        dataset = self.build_dataset(dataset_path, mode, batch_size)
        sampler = EpochSampler(len(dataset), self.settings.seed, rank=ranks.rank(), world=ranks.world())
        on_gpu = self.device.type == "cuda"
        workers = self.args.workers
        return _with_timeout(
            InfiniteDataLoader(
                dataset=dataset,
                batch_size=min(batch_size, len(dataset)),
                sampler=sampler,
                num_workers=workers,
                prefetch_factor=PREFETCHED if workers else None,
                pin_memory=on_gpu,
                collate_fn=dataset.collate_fn,
                generator=torch.Generator().manual_seed(self.settings.seed),
            )
        )

    def _close_dataloader_mosaic(self) -> None:
        super()._close_dataloader_mosaic()
        self.train_loader.sampler.next_epoch = self.epoch  # the old workers have advanced the sampler by prefetching

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._images: list[str] = list(batch["im_file"])
        return super().preprocess_batch(batch)

    # --- model ------------------------------------------------------------------------------------------------------

    def setup_model(self) -> None:
        module = self.model.to(self.device)
        # In validation, Ultralytics takes the one-to-one branches for False, and the branches that need NMS for None.
        self.args.nms = None if detect.needs_nms(module) else False
        module.args = self.args
        for hook in self.hooks:
            hook.on_model(module)
            hook.modules().to(self.device)
            extras = hook.modules()  # each rank initialised them with its own seed
            together.broadcast([*extras.parameters(), *extras.buffers()])
        self.model = module

    def _setup_ddp(self) -> None:
        """Do nothing. `together.formed` has made the process group for the whole command."""

    def _setup_train(self) -> None:
        # check_amp would download a model for a comparison. The recipe decides about AMP.
        original, engine.check_amp = engine.check_amp, lambda model: True
        try:
            with _ddp_on_cpus() if self.device.type == "cpu" and self.world_size > 1 else nullcontext():
                super()._setup_train()
        finally:
            engine.check_amp = original
        if self.settings.bfloat16:  # bfloat16 needs no gradient scaler
            self.amp = True
        model = unwrap_model(self.model)
        settle(model, len(self.train_loader) * self.epochs)  # after the EMA was copied, so its momentum does not change
        self._criterion = _HookedCriterion(model, self.hooks)
        model.criterion = self._criterion

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer, model = super().build_optimizer(model, *args, **kwargs), unwrap_model(model)
        for hook in self.hooks:
            _scale_rates(optimizer, model, hook.rates(model))
            _without_decay(optimizer, model, hook.undecayed(model))
        extras = self._extra_parameters()
        if extras:
            optimizer.add_param_group(
                {"params": extras, "lr": self.args.lr0, "weight_decay": 0.0, "param_group": "extra"}
            )
        return optimizer

    def optimizer_step(self) -> None:
        # DDP does not average the extras. Average before `unscale_` checks for infinity, so that all ranks skip the same steps.
        together.average_gradients(self._extra_parameters())
        self.scaler.unscale_(self.optimizer)
        for hook in self.hooks:
            hook.before_step(unwrap_model(self.model))
        for parameters in (self.model.parameters(), *self._extra_parts()):
            torch.nn.utils.clip_grad_norm_(parameters, max_norm=MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def _extra_parts(self) -> list[list[nn.Parameter]]:
        """Return the parameters of the modules that hooks train: one list per module.

        The gradients of each module are clipped separately. Otherwise large gradients of a module would shorten the steps of
        the student.
        """
        return [list(module.parameters()) for hook in self.hooks for module in hook.modules().values()]

    def _extra_parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self._extra_parts() for parameter in part]

    # --- saving and resuming ----------------------------------------------------------------------------------------

    @property
    def resume_file(self) -> Path:
        return self.work / "resume.pt"

    def save_model(self) -> bool:
        """Write the state after this epoch to `resume.pt`, atomically.

        Raises:
            NumericsError: The last step of the epoch left a value that is not finite. `resume.pt` stays as it was.
        """
        for model in (unwrap_model(self.model), self.ema.ema):
            check_finite(model, f"{self.what}: after epoch {self.epoch + 1}")
        state = {
            "epoch": self.epoch,
            "model": unwrap_model(self.model).state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "hooks": [{"modules": hook.modules().state_dict(), "state": hook.state_dict()} for hook in self.hooks],
            "rows": self.rows,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        atomic_write(self.resume_file, buffer.getvalue())
        return True

    def resume_training(self, ckpt: Any) -> None:
        state = self._saved
        if state is None:
            return
        with self._resuming():
            unwrap_model(self.model).load_state_dict(state["model"])
            self.ema = ModelEMA(unwrap_model(self.model), updates=state["updates"])
            self.ema.ema.load_state_dict(state["ema"])
            for saved_group, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
                saved_group["fused"] = group.get(
                    "fused"
                )  # choose the kernel for this device, not for the one that saved
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty if the run did not use float16, as on a CPU
                self.scaler.load_state_dict(state["scaler"])
            for hook, saved in zip(self.hooks, state["hooks"], strict=True):
                hook.modules().load_state_dict(saved["modules"])
                hook.load_state_dict(saved["state"])
            self.rows = list(state["rows"])
            self.start_epoch = state["epoch"] + 1
        self._saved = None  # the memory of a second model and optimizer
        self.train_loader.sampler.next_epoch = self.start_epoch
        progress.say(f"{self.what}: resuming at epoch {self.start_epoch + 1}/{self.epochs}")

    def _load_saved(self) -> dict[str, Any] | None:
        """Return the content of `resume.pt` with tensors on the CPU, or None. `load_state_dict` moves them to the device."""
        if not self.resume_file.is_file():
            return None
        with self._resuming():
            state = torch.load(self.resume_file, map_location="cpu", weights_only=True)
            if not isinstance(state["epoch"], int):
                raise TypeError(f"its epoch is a {type(state['epoch']).__name__}")
            return state  # type: ignore[no-any-return]

    @contextmanager
    def _resuming(self) -> Iterator[None]:
        """Turn any exception of a damaged `resume.pt` into CorruptArtifact."""
        try:
            yield
        except Exception as error:
            raise CorruptArtifact(
                f"{self.resume_file}: cannot be continued ({type(error).__name__}: {_first_line(error)}); "
                f"delete {self.work.parent} to start this stage again"
            ) from error

    def _do_train(self) -> None:
        """Train as Ultralytics does, but skip the loop if the last epoch was saved before the run was killed."""
        self._saved = together.from_rank_0(self._load_saved)
        if self._saved is not None and self._saved["epoch"] + 1 >= self.epochs:
            self._setup_train()
            if ranks.rank() == 0:
                self._write_rows()
            return
        super()._do_train()

    def validate(self) -> tuple[Any, Any]:
        metrics, fitness = super().validate()
        self._validated = True
        return metrics, fitness

    def save_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add a row to results.csv and rewrite the file atomically. Only rows of validated epochs have validation metrics."""
        row: dict[str, float] = {"epoch": self.epoch + 1}
        for name, value in {**metrics, **self.hook_rows}.items():
            if name.startswith(("metrics/", "val/")) and not self._validated:
                continue
            row[name] = float(value)
        self.rows.append(row)
        self._write_rows()

    def _write_rows(self) -> None:
        atomic_write(self.csv, csv_text(self.rows))

    def final_eval(self) -> None:
        """Do nothing. The last EMA is the result, and the stage measures it."""

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Call `on_epoch_end` of the hooks, compare weights and share buffers. Ultralytics calls this once an epoch, before it saves.

        There is no recovery from NaN, because `_check_batch` has already raised.
        """
        self.hook_rows.update(self._shares())
        if ranks.rank() == 0:  # only rank 0 writes the metrics
            for hook in self.hooks:
                self.hook_rows.update(hook.on_epoch_end(epoch, unwrap_model(self.model)))
        # Each rank has its own running averages of BatchNorm. All continue with those of rank 0, as after a resume.
        together.check_equal(
            [*self.model.parameters(), *self._extra_parameters()], f"{self.what}: after epoch {epoch + 1}"
        )
        extras = [hook.modules() for hook in self.hooks]
        together.broadcast(buffer for module in (unwrap_model(self.model), *extras) for buffer in module.buffers())
        return False

    def _check_batch(self) -> None:
        """Stop at the first batch whose loss is NaN or infinite on any rank.

        Raises:
            NumericsError: There is such a batch. The message names the loss, the epoch and some images of the batch. The file
                `BAD_BATCH` lists all of its images. See `together.fail` for other ranks.
        """
        good = torch.isfinite(sum(self.tloss.values(), self.loss.detach())).all()
        if not together.any_rank(~good):  # one transfer from the device
            return
        bad = [name for name, value in self.tloss.items() if not bool(torch.isfinite(torch.as_tensor(value)).all())]
        found = together.of_each_rank((bool(good), bad, self._images))
        _, bad, images = next(one for one in found if not one[0])
        listing = self.work / BAD_BATCH
        if ranks.rank() == 0:
            atomic_write(listing, "".join(f"{name}\n" for name in images))
        first = ", ".join(Path(name).name for name in images[:LISTED_IMAGES])
        more = f" and {rest} more" if (rest := len(images) - LISTED_IMAGES) > 0 else ""
        kept = f"the state after epoch {self.epoch} is kept" if self.epoch else "no epoch was completed"
        together.fail(
            NumericsError(
                f"{self.what}: {', '.join(bad) or 'the loss'} became NaN or infinite in epoch {self.epoch + 1}; {kept}. Lower "
                f"lr0 or the weight of that loss. The batch: {first}{more}, listed in {listing}"
            )
        )

    def _shares(self) -> dict[str, float]:
        """Return each hook's loss as a fraction of the total loss of this epoch. A loss with a large fraction dominates the labels."""
        means = {name: float(value) for name, value in self.tloss.items()}
        own = [name for name in means if name not in self._criterion.loss_names]
        total = sum(means.values())
        if not own or total <= 0:
            return {}
        return {"train/total": total, **{f"share/{name}": means[name] / total for name in own}}

    # --- progress ---------------------------------------------------------------------------------------------------

    def _on_train_start(self) -> None:
        self._enter(progress.bar(self.what, self.epochs, "epoch", done=self.start_epoch))

    def _on_train_epoch_start(self) -> None:
        self._oom_retries = RETRIES
        self._criterion.start_epoch(self.epoch, self.epochs)
        seed_everything(self.settings.seed, self.epoch, *([ranks.rank()] if ranks.rank() else []))
        self.train_loader.dataset.start_epoch()
        self._validated = False
        self.hook_rows = {}
        every = self.settings.val_every
        self.args.val = bool(every) and (self.epoch + 1) % every == 0
        for hook in self.hooks:
            hook.on_epoch_start(self.epoch, self.epochs)
        self._leave(to=1)
        self._enter(progress.bar(f"epoch {self.epoch + 1}/{self.epochs}", len(self.train_loader), "batch"))

    def _on_train_batch_end(self) -> None:
        self._check_batch()
        if RANK in {-1, 0}:
            self._bars[-1][1](1, **{name: float(value) for name, value in self.tloss.items()})

    def _on_fit_epoch_end(self) -> None:
        self._leave(to=1)
        if self._bars:
            figures = {name: float(value) for name, value in (self.tloss or {}).items()} | self.hook_rows
            if self._validated and self.metrics is not None:  # only rank 0 has them
                figures["map50_95"] = float(self.metrics.get("metrics/mAP50-95(B)", 0.0))
            self._bars[0][1](1, **figures)

    def _enter(self, manager: Any) -> None:
        """Show a progress bar."""
        self._bars.append((manager, manager.__enter__()))

    def _leave(self, to: int) -> None:
        """Remove progress bars until `to` are left."""
        while len(self._bars) > to:
            self._bars.pop()[0].__exit__(None, None, None)

    def close(self) -> None:
        """Remove the progress bars and the scratch folder."""
        self._leave(to=0)
        if self._scratch is not None:
            self._scratch.cleanup()


@contextmanager
def _ddp_on_cpus() -> Iterator[None]:
    """Ignore the `device_ids` that Ultralytics passes to DDP, because a CPU has no index."""
    original = nn.parallel.DistributedDataParallel

    def made(module: nn.Module, device_ids: Any = None, **options: Any) -> nn.Module:
        return original(module, **options)

    nn.parallel.DistributedDataParallel = made  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        nn.parallel.DistributedDataParallel = original  # type: ignore[misc]


def _with_timeout(loader: InfiniteDataLoader) -> InfiniteDataLoader:
    """Set a timeout on the loader, in place. Without it, the loader would wait for ever for a worker that hangs."""
    if loader.num_workers:
        loader.timeout = WORKER_PATIENCE_S
    return loader


def settle(model: nn.Module, steps: int) -> None:
    """Raise the momentum of BatchNorm for a short run, in place. The statistics then match the final weights.

    Ultralytics' momentum of 0.03 averages over about 33 steps. After 50 steps, a fifth of the statistics still comes from the
    weights at the start, and the error grows from layer to layer. A YOLOv8n trained on eight images had mAP 0.00 with
    momentum 0.03, and 0.60 with this function.

    Args:
        model: Its BatchNorm layers are changed.
        steps: Optimizer steps of the run.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None:
            module.momentum = max(module.momentum, min(1.0, AVERAGES / steps))


def _scale_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Multiply learning rates by the factors in `rates` (parameter name -> factor), in place.

    The parameters move to new groups of the optimizer, which are otherwise equal.
    """
    factor = {id(model.get_parameter(name)): rate for name, rate in rates.items()}
    for group in list(optimizer.param_groups):
        for rate in sorted({factor[id(p)] for p in group["params"] if id(p) in factor}):
            moved = [p for p in group["params"] if factor.get(id(p)) == rate]
            group["params"] = [p for p in group["params"] if factor.get(id(p)) != rate]
            optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * rate})


def _without_decay(optimizer: torch.optim.Optimizer, model: nn.Module, names: Iterable[str]) -> None:
    """Turn off weight decay for the parameters in `names`, in place.

    The parameters move to new groups of the optimizer, which are otherwise equal.
    """
    chosen = {id(model.get_parameter(name)) for name in names}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in chosen]
        if moved and group["weight_decay"]:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group({**group, "params": moved, "weight_decay": 0.0, "param_group": "no_decay"})


class _HookedCriterion:
    """The detection loss plus the losses of the hooks. Each loss is multiplied by the batch size, as Ultralytics does.

    The detection loss of an end-to-end head is the weighted sum over its branches (Ultralytics' `E2ELoss`). The weights are set at the
    start of each epoch, so a resumed run has them too. Ultralytics logs the terms of the one-to-one branches alone; here the sums are
    logged, so that the shares of the hooks' losses are right.
    """

    def __init__(self, model: nn.Module, hooks: Sequence[TrainHook]) -> None:
        self.base = model.init_criterion()
        self.hooks = hooks
        self._end_to_end = not detect.needs_nms(model)
        self.loss_names: tuple[str, ...] = (self.base.one2one if self._end_to_end else self.base).loss_names

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Set the weights of the branches of an end-to-end head for an epoch, counted from 0."""
        if self._end_to_end:
            weights = detect.branch_weights(epoch, epochs)
            self.base.o2m, self.base.o2o = weights[detect.ONE_TO_MANY], weights[detect.ONE_TO_ONE]

    def __call__(self, predictions: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, items = self.base(predictions, batch)
        if self._end_to_end:
            items = dict(zip(items, loss.detach() / batch["img"].shape[0], strict=True))
        extras = {name: value for hook in self.hooks for name, value in hook.extra_loss(batch, predictions).items()}
        if not extras:
            return loss, items
        stacked = torch.stack([value.reshape(()) for value in extras.values()]) * batch["img"].shape[0]
        return torch.cat([loss.reshape(-1), stacked]), items | {name: value.detach() for name, value in extras.items()}
