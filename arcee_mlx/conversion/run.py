"""convert: a Hugging Face checkpoint becomes an MLX checkpoint, in a memory of a few slices of one tensor.

Plan, stream, check, rename: the plan says what will be written (prepare.py), rows are read, converted and written in
place (quantize.py, calibrate.py) into a folder that the next run goes on with if this one is cut off (work_folder.py),
the result is read back and compared with the source (checks.py), and only then does it get its name.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.files import (
    TensorWriter,
    plan_shards,
    read_header,
    sync_file,
    sync_folder,
    write_index,
    write_json,
)
from ..checkpoint.hub_upload import check_upload, upload_folder
from ..checkpoint.opening import open_model
from ..errors import ConversionError
from ..measure.evaluate import compare, count_bytes
from ..measure.layers import WeightReader
from .calibrate import Calibration, check_calibration
from .card import write_card
from .checks import check_result
from .fold import Scaling, bound_scalings, count_scaled, needs_fold
from .hashes import FileHasher
from .picture import write_picture
from .plan import PlannedTensor, quantization_table
from .prepare import ConversionPlan, check_space, convert_config, plan_conversion
from .progress import Quiet
from .quantize import convert_slices
from .recipes import Recipe
from .report import write_report
from .result import Conversion
from .texts import CALIBRATION_TEXT, VERIFICATION_TEXT, Sample, read_sample
from .work_folder import WorkFolder, can_be_resumed, open_work_folder, recover

NUM_SAMPLES, SEQUENCE_LENGTH = 128, 512  # of a text to calibrate on: 65,536 tokens
VERIFICATION_SAMPLES = 32
_FORMAT = 1  # of what a work folder holds; another number starts a conversion anew


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    revision: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    calibrate: bool | str | os.PathLike[str] = False,
    num_samples: int = NUM_SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    verify: bool | str | os.PathLike[str] = False,
    upload_repo: str | None = None,
    reporter: Quiet = Quiet(),  # noqa: B008 - says nothing and keeps nothing
) -> Conversion:
    """Converts a checkpoint. The new folder appears when it is complete and checked.

    What a full disk, an unreadable source, Ctrl-C or a kill cuts off stays in a hidden folder beside it, and the same
    call goes on there. Any other failure leaves nothing.

    Args:
        hf_path: a folder with a float checkpoint of Hugging Face's form, or a hub id such as "arcee-ai/AFM-4.5B".
        mlx_path: the new folder.
        recipe: what to make of the weights; by default 4 bits in groups of 64.
        revision: branch, tag or commit of a hub id.
        overwrite: replace the checkpoint that is at `mlx_path`, once the new one is complete; unfinished work of other
            options is thrown away, too.
        allow_nonfinite: keep weights that are Inf or NaN instead of refusing them; see `convert_slices`.
        calibrate: quantize with error feedback (see calibrate.py) on this UTF-8 text; True takes the package's own.
        num_samples, sequence_length: of the calibration text: sequences at most, and tokens of each.
        verify: compare the result with the source on this UTF-8 text; True takes the package's own, which is not the
            one for calibration. Calibration and uploading imply it.
        upload_repo: hub id to upload the result to, "user/name".
        reporter: is told how far it is; see progress.py.

    Raises:
        InputError: `mlx_path` exists, or an argument is out of range.
        ConversionError: there is nothing to convert, too little disk space, another conversion is at it, or it failed
            on the way.
        ConfigError, CheckpointError, TokenizerError: the source cannot be used; see `load_model`.
        HubError: the source cannot be downloaded, or the result not be uploaded: then `mlx_path` is complete.
    """
    if upload_repo is not None:
        check_upload(upload_repo)
    recover(Path(mlx_path).expanduser().absolute())
    planned = plan_conversion(
        hf_path, mlx_path, recipe, revision=revision, overwrite=overwrite, shows_downloads=reporter.shows_downloads
    )
    check_space(planned)
    calibration = verification = None
    if calibrate is not False:
        check_calibration(planned, allow_nonfinite=allow_nonfinite)
        text = CALIBRATION_TEXT if calibrate is True else calibrate
        calibration = _read_sample(planned, text, num_samples, sequence_length)
    if verify is not False or calibration is not None or upload_repo is not None:
        text = VERIFICATION_TEXT if isinstance(verify, bool) else verify
        verification = _read_sample(planned, text, VERIFICATION_SAMPLES, SEQUENCE_LENGTH)
    started = time.perf_counter()
    identity = _identify(planned, calibration, allow_nonfinite=allow_nonfinite)
    try:
        with open_work_folder(planned.target, identity, overwrite=overwrite) as work, FileHasher() as hasher:
            hasher.add(planned.source.checkpoint.files)
            scalings = _write_weights(work, planned, calibration, allow_nonfinite=allow_nonfinite, reporter=reporter)
            source_files = hasher.digests()
            _copy_files(planned.folder, work.model, planned.conversion.carried_files)
            write_json(work.model / "config.json", convert_config(planned))
            hasher.add(sorted(work.model.glob("*.safetensors")))
            reporter.begin("check", planned.conversion.bytes)
            errors = check_result(
                work.model,
                planned.tensors,
                scalings=scalings,
                calibrated=calibration is not None,
                allow_nonfinite=allow_nonfinite,
                on_progress=reporter.advance,
            )
            comparison = None
            if verification is not None:
                result = open_model(work.model)
                reporter.begin("verify", count_bytes(planned.source, result))
                comparison = compare(planned.source, result, verification.ids, on_progress=reporter.advance)
            reporter.end()
            conversion = replace(
                planned.conversion,
                calibration=calibration,
                verification=verification,
                errors=errors,
                comparison=comparison,
                scaled_neurons=count_scaled(scalings),
                seconds=time.perf_counter() - started,
            )
            write_picture(work.model, errors, comparison)
            write_card(work.model, conversion, planned.folder, hub_id=planned.hub_id)
            write_report(
                work.model, conversion, planned.tensors, source_files=source_files, result_files=hasher.digests()
            )
            work.publish()
    except OSError as error:
        raise ConversionError(
            f"{planned.target}: cannot be written ({error.strerror or error}); expected room for "
            f"{planned.needed_bytes / 1e9:.2f} GB and the right to write; free some space and run the same command "
            f"again, which goes on from here, or name another folder"
        ) from error
    finally:
        reporter.end()
    if upload_repo is not None:
        upload_folder(planned.target, upload_repo, progress=reporter.shows_downloads)
    return replace(conversion, seconds=time.perf_counter() - started)


def _read_sample(
    planned: ConversionPlan, text: str | os.PathLike[str], num_samples: int, sequence_length: int
) -> Sample:
    config = planned.source.config
    length = min(sequence_length, config.max_position_embeddings)
    return read_sample(text, planned.folder, config, num_samples=num_samples, sequence_length=length)


def _identify(planned: ConversionPlan, sample: Sample | None, **options: Any) -> dict[str, Any]:
    """All that decides the result's bytes: where it differs, unfinished work cannot be gone on with."""
    shards = planned.source.checkpoint.files
    files = [*shards, *(planned.folder / name for name in planned.conversion.carried_files)]
    stats = {os.path.relpath(path, planned.folder): path.stat() for path in files}
    return {
        "format": _FORMAT,
        "versions": {name: version(name) for name in ("mlx", "numpy")},
        "device": str(mx.default_device()),  # which rounds in its own way
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "config": convert_config(planned),
        "tensors": [[t.key, t.source.name, t.dtype, t.form, list(t.outputs)] for t in planned.tensors],
        "calibration": None if sample is None else [sample.sha256, *sample.ids.shape],
        "options": options,
    }


def _write_weights(
    work: WorkFolder, planned: ConversionPlan, sample: Sample | None, *, allow_nonfinite: bool, reporter: Quiet
) -> Mapping[str, Scaling]:
    """Converts and writes all that is not finished; returns what neurons were scaled by."""
    plan = planned.tensors
    pending = [tensor for tensor in plan if tensor.name not in work.finished]
    total_bytes = sum(tensor.source.nbytes for tensor in plan)
    done_bytes = total_bytes - sum(tensor.source.nbytes for tensor in pending)
    facts = {tensor.key: work.finished.get(tensor.name) for tensor in plan}
    scalings = {key: Scaling.from_dict(own) for key, own in facts.items() if own}
    with _open_shards(work, plan) as (writers, sync):
        if sample is None:
            reporter.begin("convert", total_bytes, done_bytes)
            if needs_fold(planned.dtype, planned.source.config.hidden_act):
                scalings |= bound_scalings(planned.sources, plan)
            converted = convert_slices(pending, scalings, allow_nonfinite=allow_nonfinite)
        else:
            reporter.begin("calibrate", total_bytes, done_bytes)
            entries = {
                name: entry for path in work.model.glob("*.safetensors") for name, entry in read_header(path).items()
            }
            written = WeightReader(entries, quantization_table(plan))
            done = {tensor.name for tensor in plan} & work.finished.keys()
            converted = Calibration(planned, written, done, scalings, sample.ids).convert_tensors()
        try:
            with closing(converted):
                for tensor, arrays in converted:
                    writer = writers[tensor.name]
                    for name, rows in zip(tensor.outputs, arrays, strict=True):
                        writer.write(name, rows)
                    if all(writer.is_complete(name) for name in tensor.outputs):
                        scaling = scalings.get(tensor.key)
                        work.finish(tensor.name, scaling.to_dict() if scaling else {}, sync)
                    reporter.advance(tensor.key, arrays[0].shape[0] * tensor.source.nbytes // tensor.shape[0])
        except BaseException as error:
            if can_be_resumed(error):
                with suppress(OSError):  # a full disk: what was made lasting before is kept
                    work.commit(sync)
            raise
        work.commit(sync)
        reporter.end()
    return scalings


@contextmanager
def _open_shards(
    work: WorkFolder, plan: Iterable[PlannedTensor]
) -> Iterator[tuple[dict[str, TensorWriter], Callable[[], None]]]:
    """Opens the files of a plan to be written in any order.

    Yields:
        tensor name -> the writer of its file, and a function that makes all that was written lasting. Where the block
        ends without an error, the files are complete and have their index.
    """
    by_name = {tensor.name: tensor for tensor in plan}
    shards = plan_shards({name: tensor.nbytes for name, tensor in by_name.items()})  # codes and scales stay together
    writers: dict[str, TensorWriter] = {}
    try:
        for file, names in shards.items():
            outputs = {name: spec for own in names for name, spec in by_name[own].outputs.items()}
            finished = [name for own in names if own in work.finished for name in by_name[own].outputs]
            writer = TensorWriter(work.model / file, outputs, finished)
            writers |= dict.fromkeys(names, writer)
        sync_folder(work.model)  # the names of the files, before the journal speaks of what is in them
        distinct = list(dict.fromkeys(writers.values()))

        def sync() -> None:
            for writer in distinct:
                writer.sync()

        yield writers, sync
        for writer in distinct:
            writer.close()
    finally:
        for writer in writers.values():
            writer.abort()
    written = {file: [output for name in names for output in by_name[name].outputs] for file, names in shards.items()}
    write_index(work.model, written, sum(tensor.nbytes for tensor in by_name.values()))


def _copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        with open(source / name, "rb") as old, open(target / name, "wb") as new:
            shutil.copyfileobj(old, new)
            new.flush()
            sync_file(new.fileno())
