"""The input pipeline of this process: all batches, or its part of those of all workers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from recipes.data import Data, Part, Split, eval_batches, steps_per_epoch, train_stream
from recipes.training.option_table import Options


@dataclasses.dataclass(frozen=True)
class Feed:
    """The batches of a run.

    Attributes:
        data: what they are made of.
        options: of the run.
        workers: the strategy of several workers, or None.
    """

    data: Data
    options: Options
    workers: Any = None

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return steps_per_epoch(self.data.train, self.options.batch_size, self.options.limit_steps)

    def training(self, start: int, *part: Part) -> tf.data.Dataset:
        """Endless batches, from global step `start` on."""
        batch_size, seed = self.options.batch_size, self.options.seed
        return train_stream(self.data, batch_size, seed, start, self.steps, *part)

    def evaluation(self, split: Split, *part: Part) -> tf.data.Dataset:
        """The batches of a split, at most `limit_steps`."""
        batches = eval_batches(self.data, split, self.options.batch_size, *part)
        return batches.take(self.options.limit_steps) if self.options.limit_steps else batches

    def shared(self, make: Callable[..., tf.data.Dataset], what: Any) -> Any:
        """`make(what)`, of which each worker of several prepares its part alone."""
        if self.workers is None:
            return make(what)

        def make_part(context: Any) -> tf.data.Dataset:
            number, replicas = context.num_input_pipelines, context.num_replicas_in_sync
            return make(what, Part(context.input_pipeline_id, number, replicas))

        return self.workers.distribute_datasets_from_function(make_part)
