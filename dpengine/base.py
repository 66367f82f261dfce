"""The public base model, by name, folder or hub id."""

from pathlib import Path

from .models import DEFAULT_BASE, ClassConditionalPipeline


def load_base(base: str) -> ClassConditionalPipeline:
    """Load ``base``: `default` (embedded), a diffusers folder, or the hub id of one. Float32.

    Raises ValueError where it is none of these or not class-conditional.
    """
    source = DEFAULT_BASE if base == "default" else Path(base)
    try:
        pipeline = ClassConditionalPipeline.from_pretrained(
            source if source.is_dir() else base, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(
            f"base {base!r} is no class-conditional diffusers pipeline; it must be 'default', or a "
            "folder or hub id with model_index.json, unet, scheduler and class_embedding"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
