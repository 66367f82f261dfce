"""The public base model, by name, folder or hub id: looked through before anything of it is run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from transformers.utils import logging

from . import DEFAULT_BASE, FAMILIES, ClassConditionalPipeline, Family, make_path

_HOW = "docs/bases.md says which bases this command takes, and how one is made"

_WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")


def load_base(base: str) -> DiffusionPipeline:
    """Load ``base``: `default` (embedded), a diffusers folder, or the hub id of one. Float32.

    Its index is read first: components are of known classes of diffusers and transformers, and no
    code that a folder names is run. Raises ValueError, with the cause and the way out, where it is
    of no known family, cannot be read, or asks for what training does not do.
    """
    folder = DEFAULT_BASE if base == "default" else _folder(base)
    index = _read_json(folder / "model_index.json", base)
    family = _check_index(index, base)
    present = {name: index[name] for name in family.components if not _is_absent(index.get(name))}
    for name, (_, kind) in present.items():
        if name not in family.ignored and not kind.endswith(_WITHOUT_WEIGHTS):
            _check_weights(folder / name)
    absent = family.components.keys() - present.keys()
    changed: dict[str, Any] = {name: None for name in (*absent, *family.ignored)}
    changed |= {name: value for name, value in family.options.items() if value is not None}
    try:
        with quiet():
            pipeline = _pipeline_class(family).from_pretrained(
                folder, use_safetensors=True, **changed
            )
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, ImportError),
        *(RuntimeError, SafetensorError),
    ) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"base {base!r} is no diffusers pipeline that can be loaded: {reason}; {_HOW}"
        ) from error
    _check_parts(pipeline, family, base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def quiet() -> Iterator[None]:
    """Run what is inside without the remarks of diffusers and transformers, which may repeat texts
    that are private, and without transformers' progress bars."""
    libraries = (diffusers.utils.logging, logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


def _pipeline_class(family: Family) -> type[DiffusionPipeline]:
    own = {"ClassConditionalPipeline": ClassConditionalPipeline}
    return own.get(family.pipeline) or getattr(diffusers, family.pipeline)


def read_family(base: str) -> Family:
    """The family of ``base``, from its index alone. Raises ValueError as ``load_base``."""
    if base == "default" or Path(base).exists():
        folder = DEFAULT_BASE if base == "default" else _folder(base)
        return _check_index(_read_json(folder / "model_index.json", base), base)
    return _check_index(_read_json(_fetch_index(base), base), base)


def _folder(base: str) -> Path:
    """The folder of ``base``, fetched from the hub where it is an id."""
    if Path(base).exists():
        if Path(base).is_dir():
            return Path(base)
        raise ValueError(
            f"base {base!r} must be the folder of a diffusers pipeline, got a file; {_HOW}"
        )
    _check_index(_read_json(_fetch_index(base), base), base)
    try:
        return Path(DiffusionPipeline.download(base, use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_fetched(base, error) from error


def _fetch_index(base: str) -> Path:
    try:
        return Path(hf_hub_download(base, "model_index.json"))
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_fetched(base, error) from error


def _not_fetched(base: str, error: Exception) -> ValueError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ValueError(
        f"base {base!r} is no diffusers pipeline: there is no such folder, and as a hub id it "
        f"cannot be fetched ({reason}). Check spelling and connection; or give 'default', or a "
        "folder with model_index.json and the parts that it names"
    )


def _read_json(file: Path, base: str) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"base {base!r} is no diffusers pipeline: it has no {file.name}; it must be 'default', "
            f"or a folder or hub id with model_index.json and the parts that it names; {_HOW}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base {base!r} cannot be read: {file} is no JSON; copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"base {base!r} cannot be read: {file} must hold a JSON object")
    return content


def _check_index(index: dict[str, Any], base: str) -> Family:
    """The family of an index. Raises ValueError for components of other classes than those known,
    before any is imported."""
    kind = index.get("_class_name")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ValueError(
            f"base {base!r} is a {kind}; this command knows {', '.join(FAMILIES)}. Another "
            f"denoiser can be trained in a loop of your own with PrivacyEngine; {_HOW}"
        )
    for name in [name for name in index if not name.startswith("_")]:
        entry = index[name]
        if name in family.options or (name in family.optional and _is_absent(entry)):
            continue
        known = isinstance(entry, list) and len(entry) == 2
        if not known or f"{entry[0]}.{entry[1]}" not in family.components.get(name, ()):
            allowed = ", ".join(family.components.get(name, ("nothing of that name",)))
            raise ValueError(
                f"base {base!r} has the {name} {entry}; known for a {kind}: {allowed}. "
                "Others may mean another law of noise, and no code of a base is ever run"
            )
    missing = set(family.components) - set(family.optional) - set(index)
    if missing:
        raise ValueError(f"base {base!r} lacks {', '.join(sorted(missing))}; {_HOW}")
    return family


def _is_absent(entry: object) -> bool:
    return entry in (None, [None, None])


def _check_weights(component: Path) -> None:
    """Raise ValueError that names the file where a component's weights cannot be read."""
    if not component.is_dir():
        return
    files = sorted(component.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as handle:
            if handle.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{file} is a pointer of Git LFS and not the weights; run `git lfs pull` there"
                )
    plain = [f for f in files if not any(f".{v}." in f.name for v in ("fp16", "bf16", "non_ema"))]
    if plain:
        return
    others = sorted(f.name for f in component.iterdir() if f.suffix in (".bin", ".pt", ".ckpt"))
    if files:
        raise ValueError(
            f"{component} has the weights of a variant only, {files[0].name}; save them without "
            "one, as pipeline.save_pretrained does"
        )
    found = f"{others[0]}, which may run code as it is read" if others else "no weights"
    raise ValueError(
        f"{component} must hold weights as .safetensors, got {found}; save it with "
        "save_pretrained(folder, safe_serialization=True)"
    )


def _check_parts(pipeline: DiffusionPipeline, family: Family, base: str) -> None:
    """Raise ValueError for a configuration that training or sampling would not follow."""
    try:
        family.make(pipeline)
        make_path(pipeline.scheduler)
        for part, module in pipeline.components.items():
            if not isinstance(module, torch.nn.Module):
                continue
            for name, tensor in module.state_dict().items():
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"the {part}'s tensor {name} has values that are not finite, NaN or Inf"
                    )
    except ValueError as error:
        raise ValueError(f"base {base!r} cannot be used: {error}; {_HOW}") from error
