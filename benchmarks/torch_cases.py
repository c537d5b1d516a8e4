"""PyTorch's clipping (foreach), and timm's where it is installed."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import torch
from references import timm_agc

SIGMA, THRESHOLD, MAX_NORM = 0.1, 0.1, 1.0


def _parameters(shapes):
    generator = torch.Generator().manual_seed(0)
    result = []
    for shape in shapes:
        # Keras keeps the output channels last; timm's unit-wise norm expects them first.
        shape = list(reversed(shape))
        parameter = torch.nn.Parameter(0.05 * torch.randn(shape, generator=generator))
        parameter.grad = SIGMA * torch.randn(shape, generator=generator)
        result.append(parameter)
    return result


def _clips():
    """Name to a function of parameters that clips their gradients in place."""
    clips = {
        "torch clip_grad_value_": lambda p: torch.nn.utils.clip_grad_value_(
            p, THRESHOLD, foreach=True
        ),
        "torch clip_grad_norm_": lambda p: torch.nn.utils.clip_grad_norm_(
            p, MAX_NORM, foreach=True
        ),
    }
    try:
        agc = timm_agc()
    except ImportError:
        return clips
    clips["timm adaptive_clip_grad"] = lambda p: agc.adaptive_clip_grad(p, 0.01)
    return clips


def clip(which: str, shapes):
    """The clip alone: a fresh copy of the gradients each time, then the clip in place."""
    del which
    parameters = _parameters(shapes)
    fresh = [p.grad.clone() for p in parameters]
    gradients = [p.grad for p in parameters]

    def clipping(fn):
        def run():
            torch._foreach_copy_(gradients, fresh)
            fn(parameters)

        return run

    return {
        "copy on PyTorch": lambda: torch._foreach_copy_(gradients, fresh),
        **{name: clipping(fn) for name, fn in _clips().items()},
    }


def update(which: str, shapes):
    """The clip and the update of SGD with momentum; the copy of the gradients is in it."""
    del which

    def training(fn):
        parameters = _parameters(shapes)
        fresh = [p.grad.clone() for p in parameters]
        gradients = [p.grad for p in parameters]
        optimizer = torch.optim.SGD(parameters, 1e-9, momentum=0.9, foreach=True)

        def run():
            torch._foreach_copy_(gradients, fresh)
            fn(parameters)
            optimizer.step()

        return run

    return {
        "no clip, torch": training(lambda p: None),
        **{name: training(fn) for name, fn in _clips().items()},
    }


def versions() -> str:
    """The versions of what is measured."""
    try:
        from importlib.metadata import version

        timm = f", timm {version('timm')}"
    except ImportError:
        timm = ""
    return f"PyTorch {torch.__version__}{timm}"
