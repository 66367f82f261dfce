"""One module of several, for losses that take more than one: a UNet and its text encoders."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Together(nn.Module):
    """Modules that are trained as one: ``together(*args)`` is ``call(together, *args)``.

    Per-record gradients are taken of one module, whose call tells how many rows there are. The
    ``parts`` are its attributes, by the names that they are given here; ``call`` gets it and what
    it was called with, and calls the parts once each, on all rows::

        both = Together(
            lambda parts, noisy, timesteps, tokens: parts.unet(
                noisy, timesteps, parts.text_encoder(tokens)[0]
            ).sample,
            unet=unet,
            text_encoder=text_encoder,
        )

    Give it to ``make_private`` or ``Capture``, make the optimizer of its parameters, and call it,
    not the parts; what is saved is that of the parts, which stay what they were.
    """

    def __init__(self, call: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        if not callable(call) or isinstance(call, nn.Module):
            raise TypeError(
                "call must be a function of this module and its inputs, got a "
                f"{type(call).__name__}; give the modules by name, as unet=unet"
            )
        if not parts:
            raise ValueError("parts must be given by name, as unet=unet, text_encoder=text_encoder")
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {type(part).__name__}")
            if hasattr(self, name):
                raise ValueError(f"a part cannot be named {name!r}, as every module has that")
            self.add_module(name, part)
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)
