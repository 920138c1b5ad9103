"""What must hold for the gradient of every story, whatever computes it."""

import torch
from pyro.infer import Trace_ELBO

from ppl_vae.capture import capture
from ppl_vae.training.captured import StepFunction, inputs_of
from ppl_vae.training.loop import ADAM, _training
from ppl_vae.training.steps import Task, Tempering
from ppl_vae.training.supply import supply


def assert_compiled_gradient_is_the_captured_one(story, x):
    """With the same noise, each tensor to 1e-5 of its norm; the captured one is that of ``pyro.infer.SVI``.

    A tensor that is zero but for rounding, of the whole gradient, has no digits to agree in.
    """
    task = Task(
        story=story,
        columns=(x,),
        batch_size=len(x),
        loss=Trace_ELBO(),
        optimizer=ADAM(story.parameters()),
        clip=None,
        transform=None,
        tempering=Tempering(),
        warms_up=False,
        precision=None,
        seed=0,
    )
    with _training(story, x.device), supply(task, 1) as batches:
        inputs = inputs_of(task, batches[0].parts[0])
        program = capture(StepFunction(task, "outside", compiled=True), *inputs)
        compiled = program.compiled(*inputs)
        found = []
        for one in (program, compiled):
            task.reseed(1, 0)
            found.append(one(*inputs))
    (loss, norm, *gradients), (their_loss, _, *theirs) = found
    assert norm.isfinite() and norm > 0
    assert (their_loss - loss).abs() <= 1e-5 * loss.abs()
    rounding = torch.finfo(x.dtype).eps * norm
    for ours, other in zip(gradients, theirs, strict=True):
        assert (other - ours).norm() <= 1e-5 * ours.norm() + rounding
